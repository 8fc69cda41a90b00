"""The held-out loss: the same pictures, noise and timesteps at every validation, so that what
changes between two of them is the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from train.config import ValidationConfig
from train.overfitting import Measured, Side, best_of, read, risen

Batch = dict[str, Any]


class HeldOut(Protocol):
    """What the loss is measured on: "held_out" pictures, and "train" ones as many."""

    @property
    def ids(self) -> Mapping[str, list[str]]:
        """The pictures of each of the two."""

    @property
    def timesteps(self) -> Mapping[str, np.ndarray]:
        """Which each picture is seen at, (n, k) of each of the two; their first quarter of columns
        is from the first quarter of the schedule, and so on."""

    def __len__(self) -> int:
        """How many batches this process has: as many as every other, as some wrappers demand."""

    def __iter__(self) -> Iterator[Batch]:
        """This process's batches. "row" (B,) of each says which loss it is: picture times k plus
        timestep, held-out pictures first; -1 is padding."""


class Validation:
    """Measures, writes OUTPUT/step-00000100.json and warns once the held-out loss has risen.

    held_out: None for a run that has nothing to validate on. start: the step the run is resumed
    from; what was measured up to there is read again, what came later is forgotten. kept: the steps
    that have a checkpoint. To be made by all processes, before any of them writes.
    """

    best: Measured | None
    """The lowest after training began of what has a checkpoint, or is to have one."""

    def __init__(
        self,
        held_out: HeldOut | None,
        config: ValidationConfig,
        output: Path,
        accelerator: Accelerator,
        *,
        start: int,
        kept: Collection[int] = (),
    ) -> None:
        self._held_out, self._config, self._output = held_out, config, output
        self._accelerator = accelerator
        # At step 0 nothing binds a run to what was measured before, perhaps on another base.
        known = read(output, until=start) if start else []
        self._history = [one for one in known if held_out is None or _is_of(one, held_out)]
        self._warned = any(self._risen(end) for end in range(len(self._history) + 1))
        self.best = best_of(self._history, kept, config.metric)
        accelerator.wait_for_everyone()  # the others read what is to be forgotten
        if accelerator.is_main_process:
            _forget(output, start)

    def due(self, done: int, steps: int) -> bool:
        """Whether to measure after `done` of `steps` optimizer steps: every so often, at the last,
        and before the first."""
        every = self._config.every
        if self._held_out is None or not every or any(one.step == done for one in self._history):
            return False
        return done == steps or done % every == 0

    def run(self, model: nn.Module, done: int) -> Measured:
        """The held-out loss of the model as it is, where it is due. A place where all processes
        meet."""
        assert self._held_out is not None
        measured = self._measured(self._held_out, done, self._losses(self._held_out, model))
        if done > 0 and self._is_lower(measured):
            self.best = measured
        self._history.append(measured)
        if self._accelerator.is_main_process:
            self._say(measured)
        return measured

    def write(self, measured: Measured) -> None:
        """Puts down that it was measured: a run that is resumed there does not measure again."""
        if self._accelerator.is_main_process:
            measured.write(self._output)

    def _is_lower(self, measured: Measured) -> bool:
        """Than the best so far; never where it is not a number."""
        metric = self._config.metric
        limit = math.inf if self.best is None else self.best.value(metric)
        return measured.value(metric) < limit

    def _measured(self, held_out: HeldOut, done: int, losses: np.ndarray) -> Measured:
        sides, at = {}, 0
        for name, timesteps in held_out.timesteps.items():
            mine = losses[at : at + timesteps.size].reshape(timesteps.shape)
            sides[name] = Side(list(held_out.ids[name]), timesteps, mine)
            at += timesteps.size
        return Measured(done, sides["held_out"], sides["train"])

    def _losses(self, held_out: HeldOut, model: nn.Module) -> np.ndarray:
        """Every loss by its row, float64, on all processes."""
        device = self._accelerator.device
        count = sum(timesteps.size for timesteps in held_out.timesteps.values())
        # Each row is one process's and 0 in the others'; the one too many is the padding's.
        losses = torch.zeros(count + 1, device=device)
        shown = self._accelerator.is_main_process
        batches = tqdm(held_out, "held-out loss", leave=False, delay=2.0, disable=not shown)
        with torch.no_grad(), at_rest(model):
            for batch in batches:
                rows = batch.pop("row").to(device)
                losses[rows] = model(_moved(batch, device)).float()
        found = self._accelerator.reduce(losses[:-1], reduction="sum")
        return found.cpu().double().numpy()

    def _say(self, measured: Measured) -> None:
        loss, trained = measured.held_out.mean("loss"), measured.train.mean("loss")
        tqdm.write(
            f"step {measured.step}: held-out loss {loss:.4f}, of pictures trained on {trained:.4f}"
        )
        rise = self._risen(len(self._history))
        if rise and not self._warned:
            self._warned = True
            tqdm.write(f"warning: {rise}")

    def _risen(self, end: int) -> Any:
        return risen(self._history[:end], self._config.metric)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Without dropout. `requires_grad` stays as it is: sharded wrappers take it over for good from
    the first forward pass."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _is_of(measured: Measured, held_out: HeldOut) -> bool:
    """Whether it was measured on the same, so that its losses can be compared."""
    side = measured.held_out
    same = np.array_equal(side.timesteps, held_out.timesteps["held_out"])
    return same and side.ids == list(held_out.ids["held_out"])


def _forget(output: Path, start: int) -> None:
    """Removes what a run that is resumed at `start` measures again."""
    for path in output.glob("step-*.json"):
        step = path.stem.removeprefix("step-")
        if step.isdecimal() and (int(step) > start or start == 0):
            path.unlink(missing_ok=True)
