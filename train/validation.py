"""The held-out loss: the same pictures, noise and timesteps at every validation, so that what
changes between two of them is the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from train import screens
from train.config import ValidationConfig
from train.course import Course
from train.overfitting import Measured, Side, loss_of, read, risen

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


class Validation(Course[Measured]):
    """Measures, writes OUTPUT/step-00000100.json and warns once the held-out loss has risen.

    held_out: None for a run that has nothing to validate on. The rest is as for Course.
    """

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
        self._held_out, self._loss = held_out, loss_of(config.metric)
        known = read(output, until=start) if start else []
        super().__init__(
            [one for one in known if held_out is None or _is_of(one, held_out)],
            output,
            accelerator,
            title=f"held-out {self._loss}",
            every=config.every if held_out is not None else 0,
            metric=self._loss,
            start=start,
            kept=kept,
        )
        self._warned = any(self._risen(end) for end in range(len(self._history) + 1))

    def run(
        self, model: nn.Module, done: int, check: Callable[[], None] = lambda: None
    ) -> Measured:
        """The held-out loss of the model as it is, where it is due. A place where all processes
        meet; before each batch they `check` whether to go on."""
        assert self._held_out is not None
        measured = self._measured(self._held_out, done, self._losses(self._held_out, model, check))
        self._add(measured)
        if self._accelerator.is_main_process:
            self._say(measured)
        return measured

    def _measured(self, held_out: HeldOut, done: int, losses: np.ndarray) -> Measured:
        sides, at = {}, 0
        for name, timesteps in held_out.timesteps.items():
            mine = losses[at : at + timesteps.size].reshape(timesteps.shape)
            sides[name] = Side(list(held_out.ids[name]), timesteps, mine)
            at += timesteps.size
        return Measured(done, sides["held_out"], sides["train"])

    def _losses(self, held_out: HeldOut, model: nn.Module, check: Callable[[], None]) -> np.ndarray:
        """Every loss by its row, float64, on all processes."""
        device = self._accelerator.device
        count = sum(timesteps.size for timesteps in held_out.timesteps.values())
        # Each row is one process's and 0 in the others'; the one too many is the padding's.
        losses = torch.zeros(count + 1, device=device)
        shown = self._accelerator.is_main_process
        batches = screens.track(
            held_out, "held-out loss", total=len(held_out), unit="batches", shown=shown
        )
        with torch.no_grad(), at_rest(model):
            for batch in batches:
                check()
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
        return risen(self._history[:end], self._loss)


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
