"""What the numbers of metrics.jsonl are called on a dashboard, and their units.

The names of metrics.jsonl are a contract and stay as they are; a dashboard shows what belongs
together side by side, under names that say more. Imports nothing, for train/dashboard_process.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

AXIS = "step"
"""Optimizer steps, what every curve is drawn over."""
CONFIDENT = 1.96  # standard errors on either side of a mean, for 95 %


class Curve(NamedTuple):
    title: str
    """PANEL/NAME on the dashboard."""
    unit: str


CURVES: dict[str, Curve] = {
    "epoch": Curve("train/epochs", "passes over the pictures"),
    "loss": Curve("train/loss", "mean squared error of the prediction, weighted as configured"),
    "lr": Curve("train/learning_rate", "per optimizer step"),
    "grad_norm": Curve("train/gradient_norm", "length before clipping"),
    "left_out": Curve("train/steps_left_out", "optimizer steps whose loss was not finite, so far"),
    "images_per_second": Curve("speed/images_per_second", "images/s, over all processes"),
    "data_wait_fraction": Curve("speed/data_wait_fraction", "share of the time, 0 to 1"),
    "mfu": Curve("speed/peak_rate_fraction", "share of the device's peak rate, 0 to 1"),
    "peak_memory_gib": Curve("memory/peak_gib", "GiB"),
    "validation/loss": Curve("validation/loss", "mean squared error on held-out pictures"),
    "validation/loss_low": Curve("validation/loss_low", "lower end of its 95 % interval"),
    "validation/loss_high": Curve("validation/loss_high", "upper end of its 95 % interval"),
    "validation/loss_se": Curve("validation/loss_se", "its standard error over pictures"),
    "validation/train_loss": Curve("validation/train_loss", "the same on pictures trained on"),
    "validation/gap": Curve("validation/gap", "held-out minus trained on"),
    "validation/loss_q1": Curve(
        "validation/loss_q1", "first quarter of the timesteps: least noise"
    ),
    "validation/loss_q2": Curve("validation/loss_q2", "second quarter of the timesteps"),
    "validation/loss_q3": Curve("validation/loss_q3", "third quarter of the timesteps"),
    "validation/loss_q4": Curve("validation/loss_q4", "last quarter of the timesteps: most noise"),
}
QUARTERS = [f"validation/loss_q{quarter}" for quarter in (1, 2, 3, 4)]
INTERVAL = ["validation/loss", "validation/loss_low", "validation/loss_high"]


def curve(name: str) -> Curve:
    """Of a number of metrics.jsonl; one that is not in the table keeps its name."""
    if name.startswith("lr_"):  # of a part with a rate of its own
        return Curve(f"train/learning_rate_{name[3:]}", CURVES["lr"].unit)
    return CURVES.get(name) or Curve(name, "")


def drawn(line: Mapping[str, Any]) -> Iterator[tuple[Curve, float]]:
    """A line's numbers with their curves, an interval beside a held-out loss; without its step and
    what is not finite."""
    for name, value in {**line, **interval(line)}.items():
        if name != AXIS and isinstance(value, int | float) and math.isfinite(value):
            yield curve(name), value


def interval(line: Mapping[str, Any]) -> dict[str, float]:
    """The 95 % interval of a line's held-out loss, where it has a standard error."""
    loss, error = line.get("validation/loss"), line.get("validation/loss_se")
    if loss is None or error is None:
        return {}
    spread = CONFIDENT * error
    return {"validation/loss_low": loss - spread, "validation/loss_high": loss + spread}


def units() -> dict[str, str]:
    """The unit of every curve by its title."""
    return {title: unit for title, unit in CURVES.values()}
