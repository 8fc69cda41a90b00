"""What held-out losses say: how low, how sure, and whether training has gone too far.

Plain numbers and their files: train/validation.py measures them, train/report.py shows them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.course import read_steps, write_step

Metric = Literal["loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"]

QUARTERS: tuple[Metric, ...] = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")
STANDARD_ERRORS = 2  # so many above the best counts as risen
IN_A_ROW = 2  # so many validations


@dataclass(frozen=True, eq=False)
class Side:
    """The losses of some pictures, of each at several timesteps."""

    ids: list[str]
    timesteps: np.ndarray
    """(n, k) int64; the first quarter of the columns are from the first quarter of the schedule,
    which has the least noise."""
    losses: np.ndarray
    """(n, k) float64."""

    def of_pictures(self, metric: Metric) -> np.ndarray:
        """Each picture's mean (n,), over all of its timesteps or those of one quarter."""
        if metric == "loss":
            return self.losses.mean(1)
        each = self.losses.shape[1] // len(QUARTERS)
        first = QUARTERS.index(metric) * each
        return self.losses[:, first : first + each].mean(1)

    def mean(self, metric: Metric) -> float:
        return float(self.of_pictures(metric).mean())

    def same_as(self, other: Side) -> bool:
        """Whether both are of the same pictures, at the same timesteps."""
        return self.ids == other.ids and np.array_equal(self.timesteps, other.timesteps)


@dataclass(frozen=True, eq=False)
class Measured:
    """One validation: held-out pictures, and as many of those that are trained on."""

    step: int
    held_out: Side
    train: Side

    def value(self, metric: Metric) -> float:
        return self.held_out.mean(metric)

    def metrics(self) -> dict[str, float | None]:
        """As metrics.jsonl has them; None for what is not finite."""
        loss, trained = self.held_out.mean("loss"), self.train.mean("loss")
        quarters: dict[str, float] = {quarter: self.held_out.mean(quarter) for quarter in QUARTERS}
        found = {
            "loss": loss,
            **quarters,
            "loss_se": standard_error(self.held_out.of_pictures("loss")),
            "train_loss": trained,
            "gap": loss - trained,
        }
        return {
            f"validation/{name}": value if math.isfinite(value) else None
            for name, value in found.items()
        }

    def write(self, folder: Path) -> None:
        """FOLDER/step-00000100.json with every loss, whole or not at all."""
        content = {"metrics": self.metrics()}
        content |= {"held_out": _described(self.held_out), "train": _described(self.train)}
        write_step(folder, self.step, content)


@dataclass(frozen=True)
class Rise:
    """How much higher a held-out loss is than at its best."""

    step: int
    best: int
    """The step at which it was lowest; 0 is the base."""
    amount: float
    error: float
    """The standard error of `amount`."""

    def __str__(self) -> str:
        much = f"{self.amount:.3g} ± {self.error:.2g} (standard error)"
        if not self.best:
            return (
                f"the held-out loss is above the base's at {IN_A_ROW} validations in a row, at "
                f"step {self.step} by {much}: on pictures that it is not trained on, the model has "
                "become worse. Lower optim.learning_rate or train.steps, or see whether the "
                "held-out pictures and captions are like those trained on"
            )
        return (
            f"the held-out loss has risen since step {self.best} at {IN_A_ROW} validations in a "
            f"row, at step {self.step} by {much}: the model is learning its pictures by heart. "
            "validation.use_best=true ends with the weights of the best checkpoint. Or lower "
            "train.steps or optim.learning_rate, or train on more pictures"
        )


def risen(history: Sequence[Measured], metric: Metric) -> Rise | None:
    """How much the held-out loss has risen by the end of `history`; None where it is not sure.

    Sure is what is more than 2 standard errors above the best before, at the last 2 validations.
    As noise and timesteps are the same every time, each picture is compared with itself, and its
    own difficulty cancels: the paired t statistic (Student 1908, "The probable error of a mean").
    """
    if len(history) <= IN_A_ROW:
        return None
    ends = range(len(history) + 1 - IN_A_ROW, len(history) + 1)
    rises = [_sure_rise(history[:end], metric) for end in ends]
    return rises[-1] if all(rises) else None


def _sure_rise(history: Sequence[Measured], metric: Metric) -> Rise | None:
    """Of the last over the best before it."""
    *earlier, last = history
    best = lowest(earlier, metric)
    if best is None:
        return None
    change = last.held_out.of_pictures(metric) - best.held_out.of_pictures(metric)
    amount, error = float(change.mean()), standard_error(change)
    sure = amount > STANDARD_ERRORS * error  # never where either is not a number
    return Rise(last.step, best.step, amount, error) if sure else None


def loss_of(metric: object) -> Metric:
    """The held-out loss of that name; their mean where it is something else that chooses."""
    return next((quarter for quarter in QUARTERS if quarter == metric), "loss")


def lowest(history: Sequence[Measured], metric: Metric) -> Measured | None:
    """The first that is lowest in `metric`; None where there is none with a finite loss."""
    finite = [one for one in history if math.isfinite(one.value(metric))]
    return min(finite, key=lambda one: one.value(metric), default=None)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values (n,); nan for fewer than two."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def read(folder: Path, *, until: float = math.inf) -> list[Measured]:
    """All validations of a run up to a step that can be compared with the last of them, by step;
    unreadable files are left out."""
    found = [_read(content) for content in read_steps(folder)]
    intact = [one for one in found if one is not None and one.step <= until]
    return [one for one in intact if one.held_out.same_as(intact[-1].held_out)]


def _read(content: dict[str, Any]) -> Measured | None:
    try:
        return Measured(int(content["step"]), _side(content["held_out"]), _side(content["train"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _described(side: Side) -> dict[str, Any]:
    rows = zip(side.ids, side.timesteps.tolist(), side.losses.tolist(), strict=True)
    return {
        id: {"timesteps": steps, "losses": [v if math.isfinite(v) else None for v in losses]}
        for id, steps, losses in rows
    }


def _side(described: dict[str, Any]) -> Side:
    timesteps = np.array([one["timesteps"] for one in described.values()], np.int64)
    losses = np.array([one["losses"] for one in described.values()], np.float64)  # null is nan
    if losses.ndim != 2 or losses.shape != timesteps.shape:
        raise ValueError("not a loss for each timestep")
    return Side(list(described), timesteps, losses)
