"""What is measured every so often in the course of training: its files, and which of it is best.

The held-out loss (train/validation.py) and the scores of pictures (train/examination.py) are both
such a course, and either can choose the best checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Better = Literal["less", "more"]


class Point(Protocol):
    """What was measured after one step."""

    @property
    def step(self) -> int: ...

    def metrics(self) -> dict[str, float | None]:
        """As metrics.jsonl has them; None for what is not finite."""

    def value(self, metric: Any) -> float:
        """One of its numbers, nan where it has none of that name."""

    def write(self, folder: Path) -> None:
        """FOLDER/step-00000100.json, whole or not at all."""


P = TypeVar("P", bound=Point)


class Course(Generic[P]):
    """All that was measured so far, and the best of it.

    known: what a run that is resumed at step `start` had measured up to there; files of what came
    later are removed from `folder`. every: optimizer steps between two, 0 for none. metric: what
    the best is best in; `better` says which way. kept: the steps that have a checkpoint. To be made
    by all processes, before any of them writes.
    """

    best: P | None
    """The best after training began of what has a checkpoint, or is to have one."""

    def __init__(
        self,
        known: Sequence[P],
        folder: Path,
        accelerator: Accelerator,
        *,
        title: str,
        every: int,
        metric: str,
        better: Better = "less",
        start: int,
        kept: Collection[int] = (),
    ) -> None:
        self.title = title
        """What the best is best in, for the user."""
        self._folder, self._accelerator = folder, accelerator
        self._every, self._metric, self._better = every, metric, better
        self._history: list[P] = []
        self.best = None
        for one in known:
            self._add(one, has_checkpoint=one.step in kept)
        accelerator.wait_for_everyone()  # the others read what is to be forgotten
        if accelerator.is_main_process:
            forget(folder, start)

    @property
    def value(self) -> float:
        """That of the best, nan where there is none."""
        return math.nan if self.best is None else self.best.value(self._metric)

    def due(self, done: int, steps: int) -> bool:
        """Whether to measure after `done` of `steps` optimizer steps: every so often, at the last,
        and before the first."""
        if not self._every or any(one.step == done for one in self._history):
            return False
        return done == steps or done % self._every == 0

    def write(self, found: P) -> None:
        """Puts down that it was measured: a run that is resumed there does not measure again."""
        if self._accelerator.is_main_process:
            found.write(self._folder)

    def _add(self, found: P, *, has_checkpoint: bool = True) -> None:
        self._history.append(found)
        if found.step > 0 and has_checkpoint and self._is_better(found.value(self._metric)):
            self.best = found

    def _is_better(self, value: float) -> bool:
        """Than the best so far; never where it is not a number."""
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < self.value if self._better == "less" else value > self.value


def write_step(folder: Path, step: int, content: Mapping[str, Any]) -> None:
    """FOLDER/step-00000100.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{named(step)}.json"
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(json.dumps({"step": step, **content}) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_steps(folder: Path) -> Iterator[dict[str, Any]]:
    """The contents by step; unreadable files are left out."""
    for path in sorted(folder.glob("step-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            yield content


def forget(folder: Path, start: int) -> None:
    """Removes what a run that is resumed at `start` measures again, with its pictures. At step 0
    nothing binds a run to what was measured before, perhaps on another base."""
    for path in folder.glob("step-*"):
        step = path.stem.removeprefix("step-")
        if step.isdecimal() and (int(step) > start or start == 0):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def named(step: int) -> str:
    return f"step-{step:08d}"
