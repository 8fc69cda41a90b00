"""What a run is guarded against: numbers that are not finite, before they reach the weights, and
memory that does not suffice.

On a GPU nothing may wait for the device at every step, so there the device itself decides, and the
host looks later (`LateGuard`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from train import zero
from train.config import LoopConfig, RunFailed
from train.sharding import whole
from train.stopping import Agreement

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.checkpoint import Checkpoints

_NAMED = 12  # samples in a message
_UNSEEN = 64  # steps that a device may be ahead of the host's look at them


class Seen(NamedTuple):
    """What one optimizer step has seen in this process."""

    loss: Tensor
    """() its part of the global batch's loss."""
    losses: list[tuple[list[str], Tensor]]
    """Of each micro-batch the names of its samples and their losses (B,)."""


class Guard(Protocol):
    """Has all processes leave out a step where the loss or the gradient of any is not finite, names
    its samples, and ends the run after too many in a row."""

    def step(self, done: int, seen: Seen, norm: Any, optimizer: Any) -> Tensor:
        """Takes optimizer step number `done`, or leaves it out; () 1 where it is taken, else 0, on
        the device. All processes meet here, and give the same.

        norm: the gradient's over all processes, before clipping. Raises RunFailed where one too
        many was left out.
        """

    def settled(self) -> int:
        """How many were left out so far, every step looked at. All processes meet here; raises as
        `step`."""

    def state(self) -> dict[str, int]:
        """For a checkpoint, every step looked at. As `settled`."""


def guard_of(
    accelerator: Accelerator,
    agreement: Agreement,
    optimizer: torch.optim.Optimizer,
    *,
    allowed: int,
    before: dict[str, int] | None = None,
) -> Guard:
    """The guard of an optimizer, as it was before being prepared.

    allowed: how many in a row may be left out. before: what `state` gave at the checkpoint.
    """
    account = _Account(accelerator, allowed, before)
    if can_be_late(accelerator, optimizer):
        return LateGuard(account, optimizer)
    return PromptGuard(account, agreement)


def can_be_late(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the host would wait for a device, and the optimizer leaves out a step by itself.

    torch's fused kernels do, as they must under a gradient scaler, which has its own ways.
    """
    waits = accelerator.device.type == "cuda" and accelerator.scaler is None
    waits = waits and not zero.is_used(accelerator)  # which decides by itself
    plain = all(type(p) is torch.nn.Parameter for g in optimizer.param_groups for p in g["params"])
    return waits and plain and heeds_found_inf(optimizer)


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused")) and isinstance(optimizer, torch.optim.Adam)


class PromptGuard:
    """Looks at each step before it is taken."""

    def __init__(self, account: _Account, agreement: Agreement) -> None:
        self._account, self._agreement = account, agreement
        self._accelerator = account.accelerator

    def state(self) -> dict[str, int]:
        return self._account.state()

    def settled(self) -> int:
        return self._account.left_out

    def step(self, done: int, seen: Seen, norm: Any, optimizer: Any) -> Tensor:
        sound = self._passes(seen, norm, optimizer)
        if sound:
            optimizer.step()
        self._account.take(done, seen, sound)
        return torch.full((), float(sound), device=seen.loss.device)

    def _passes(self, seen: Seen, norm: Any, optimizer: Any) -> bool:
        # All meet in each of these, so none may depend on what this process alone has seen.
        gradient = _is_finite(norm) and not getattr(optimizer, "overflow", False)
        left_to_scaler = not gradient and self._is_scaled()
        sound = bool(seen.loss.isfinite()) and (gradient or left_to_scaler)
        return not self._agreement.most(not sound)[0]

    def _is_scaled(self) -> bool:
        """Whether a gradient may be too large for fp16 alone: its scaler leaves out the step
        itself, and scales less from then on."""
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1


class LateGuard:
    """Has the device decide, by the optimizer's own `found_inf`, and looks at it some steps later:
    where a checkpoint or a line of metrics needs to know, and after 64 steps at the latest.

    What is left out is the same as a PromptGuard's; only its warning, or the end of the run, comes
    later.
    """

    def __init__(self, account: _Account, optimizer: torch.optim.Optimizer) -> None:
        self._account, self._optimizer = account, optimizer
        self._unseen: list[tuple[int, Seen, Tensor]] = []

    def state(self) -> dict[str, int]:
        self.settled()
        return self._account.state()

    def settled(self) -> int:
        unseen, self._unseen = self._unseen, []
        if unseen:
            broken = torch.stack([found for _, _, found in unseen]).tolist()  # waits for the device
            for (done, seen, _), found in zip(unseen, broken, strict=True):
                self._account.take(done, seen, not found)
        return self._account.left_out

    def step(self, done: int, seen: Seen, norm: Any, optimizer: Any) -> Tensor:
        found = (~(seen.loss.isfinite() & torch.as_tensor(norm).isfinite())).float()
        if self._account.accelerator.num_processes > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        self._optimizer.found_inf = found  # type: ignore[attr-defined]
        optimizer.step()
        self._unseen.append((done, seen, found))
        if len(self._unseen) >= _UNSEEN:
            self.settled()
        return 1 - found


class _Account:
    """What was left out, and when it is too much."""

    def __init__(
        self, accelerator: Accelerator, allowed: int, before: dict[str, int] | None
    ) -> None:
        self.accelerator, self._allowed = accelerator, allowed
        self._in_a_row, self.left_out = 0, 0
        if before is not None:
            self._in_a_row, self.left_out = before["in_a_row"], before["left_out"]

    def state(self) -> dict[str, int]:
        return {"in_a_row": self._in_a_row, "left_out": self.left_out}

    def take(self, done: int, seen: Seen, sound: bool) -> None:
        """Step number `done`. Raises RunFailed where one too many was left out."""
        if sound:
            self._in_a_row = 0
        else:
            self._leave_out(done, seen)

    def _leave_out(self, done: int, seen: Seen) -> None:
        self._in_a_row += 1
        self.left_out += 1
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        what = _named(seen)
        if self._in_a_row > self._allowed:
            raise RunFailed(
                f"step {done}: {what}; it is number {self._in_a_row} in a row "
                f"(train.skip_non_finite={self._allowed}). The weights are finite, and the last "
                "checkpoint is intact. Look at those pictures and captions; or lower "
                "optim.learning_rate, or use train.mixed_precision=bf16 or no, in a new output="
            )
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: step {done} is left out: {what}")


def _named(seen: Seen) -> str:
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
