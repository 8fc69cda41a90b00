"""What a run is guarded against: numbers that are not finite, before they reach the weights, and
memory that does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from train.config import LoopConfig, RunFailed
from train.sharding import whole
from train.stopping import Agreement

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.checkpoint import Checkpoints

_NAMED = 12  # samples in a message


class Seen(NamedTuple):
    """What one optimizer step has seen in this process."""

    loss: Tensor
    """() its part of the global batch's loss."""
    losses: list[tuple[list[str], Tensor]]
    """Of each micro-batch the names of its samples and their losses (B,)."""


class Guard:
    """Has all processes leave out a step where the loss or the gradient of any is not finite, and
    ends the run after too many in a row.

    allowed: how many in a row may be left out. before: what `state` gave at the checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        agreement: Agreement,
        *,
        allowed: int,
        before: dict[str, int] | None = None,
    ) -> None:
        self._accelerator, self._agreement, self._allowed = accelerator, agreement, allowed
        self._in_a_row, self.left_out = 0, 0
        if before is not None:
            self._in_a_row, self.left_out = before["in_a_row"], before["left_out"]

    def state(self) -> dict[str, int]:
        return {"in_a_row": self._in_a_row, "left_out": self.left_out}

    def passes(self, done: int, seen: Seen, norm: Any, optimizer: Any) -> bool:
        """Whether step number `done` may be taken. All processes meet here, and give the same.

        norm: the gradient's over all processes, before clipping. Names the samples of a step that
        is left out; raises RunFailed where it is one too many.
        """
        # All meet in each of these, so none may depend on what this process alone has seen.
        gradient = _is_finite(norm) and not getattr(optimizer, "overflow", False)
        left_to_scaler = not gradient and self._is_scaled()
        sound = bool(seen.loss.isfinite()) and (gradient or left_to_scaler)
        if not self._agreement.most(not sound)[0]:
            self._in_a_row = 0
            return True
        self._leave_out(done, seen)
        return False

    def _is_scaled(self) -> bool:
        """Whether a gradient may be too large for fp16 alone: its scaler leaves out the step
        itself, and scales less from then on."""
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def _leave_out(self, done: int, seen: Seen) -> None:
        self._in_a_row += 1
        self.left_out += 1
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()
        what = self._named(seen)
        if self._in_a_row > self._allowed:
            raise RunFailed(
                f"step {done}: {what}; it is number {self._in_a_row} in a row "
                f"(train.skip_non_finite={self._allowed}). The weights are finite, and the last "
                "checkpoint is intact. Look at those pictures and captions; or lower "
                "optim.learning_rate, or use train.mixed_precision=bf16 or no, in a new output="
            )
        if self._accelerator.is_main_process:
            tqdm.write(f"warning: step {done} is left out: {what}")

    def _named(self, seen: Seen) -> str:
        """What is not finite, of all processes; the samples in order."""
        from accelerate.utils import gather_object

        broken = [
            name
            for names, losses in seen.losses
            for name, finite in zip(names, losses.isfinite().tolist(), strict=True)
            if not finite
        ]
        of_loss = gather_object(broken)
        if of_loss:
            return f"the loss is not finite for {_few(of_loss)}"
        of_step = gather_object([name for names, _ in seen.losses for name in names])
        return f"the gradient is not finite; the step has {_few(of_step)}"


def _few(names: list[str]) -> str:
    names = list(dict.fromkeys(map(str, names)))
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _is_finite(norm: Any) -> bool:
    return bool(torch.as_tensor(whole(norm) if isinstance(norm, Tensor) else norm).isfinite())


@contextmanager
def memory_named(
    checkpoints: Checkpoints, config: LoopConfig, accelerator: Accelerator
) -> Iterator[None]:
    """Turns an error for want of memory into RunFailed with the last checkpoint and what to
    lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0] or type(error).__name__
        with suppress(RunFailed):  # what was being written is the last; if it fails, another is
            checkpoints.wait()
        raise RunFailed(
            f"out of memory ({first.rstrip('.')}); {_kept(checkpoints)}. "
            f"{_savings(config, accelerator)}"
        ) from None


def _kept(checkpoints: Checkpoints) -> str:
    if kept := checkpoints.steps():
        return f"the checkpoint of step {kept[-1]} is kept"
    # Another process than the one that writes may be the first to end.
    return "there is no checkpoint yet" if checkpoints.writes else "any checkpoint is kept"


def is_out_of_memory(error: BaseException) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def _savings(config: LoopConfig, accelerator: Accelerator) -> str:
    """What needs less memory, first what leaves the training as it is."""
    train, same, other = config.train, [], []
    micro = train.micro_batch_size or -(-train.batch_size // accelerator.num_processes)
    if micro > 1:
        less = f"train.micro_batch_size={micro // 2} in place of {micro}"
        same.append(f"{less}, which leaves the batch as large")
    if not train.gradient_checkpointing:
        same.append("train.gradient_checkpointing=true, which only takes time")
    if train.mixed_precision == "no" and accelerator.device.type == "cuda":
        other.append("train.mixed_precision=bf16")
    if config.optim.name == "adamw":
        other.append("optim.name=adamw8bit")
    other.append("a smaller data.resolution")
    begin = f"A new output= needs less with {' or '.join(other)}"
    return f"The same command goes on with {', and '.join(same)}. {begin}" if same else begin
