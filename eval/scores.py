"""What an evaluation found, in the form of metrics.json.

An *arm* is a set of pictures that are measured alike: `finetuned` and `base` got the same prompts
and seeds; of a subject there are `base_class` (the base, prompted with the class instead of the
subject), `real` (real pictures against real pictures: the ceiling) and `training` (a copy of the
training set).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FORMAT = 2  # of metrics.json

ARMS = {
    "base": "base",
    "base_class": "base, class words",
    "finetuned": "fine-tuned",
    "real": "real pictures",
    "training": "copy of the training set",
}

MAIN = ("base", "base_class", "finetuned")
"""The arms that make pictures of the same prompts and seeds."""


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval, where it has one, and of how many pictures it is."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Change:
    """Fine-tuned minus base, on the same prompts and seeds."""

    value: float
    low: float
    high: float
    p: float | None = None
    """Of a paired test against no change."""
    effect: float | None = None
    """Mean difference over its standard deviation between prompts (Cohen's d_z)."""

    @property
    def direction(self) -> int:
        """1 or -1 where the interval lies on one side of 0 and the test agrees, else 0."""
        if self.p is not None and self.p > 0.05:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Score:
    """One metric, of every arm that has it."""

    title: str
    better: Literal["less", "more"] | None
    """Whether less or more of it is better; None: neither is."""
    values: Mapping[str, Value]
    """By arm."""
    how: str
    """How it was computed, in sentences for the report."""
    change: Change | None = None
    against: str = "base"
    """The arm that the change is from."""
    interval: str = ""
    """What the intervals are of."""
    warning: str = ""
    """What must be known beside the number."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever repeats or explains it: counts, dimension, convention."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Score:
        """From what metrics.json holds."""
        values = {arm: Value(**value) for arm, value in content["values"].items()}
        change = Change(**content["change"]) if content["change"] else None
        return cls(**{**content, "values": values, "change": change})

    @property
    def improved(self) -> int:
        """1 where fine-tuning surely made it better, -1 worse, else 0."""
        if self.change is None or self.better is None:
            return 0
        return self.change.direction * (1 if self.better == "more" else -1)
