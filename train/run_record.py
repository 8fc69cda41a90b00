"""What a run directory tells of a run, for its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train import examination, overfitting
from train.examination import Examined
from train.overfitting import Measured, Metric
from train.tracking import read_metrics


@dataclass(frozen=True)
class Run:
    """What a run directory tells of a run; whatever is missing or unreadable is empty."""

    folder: Path
    config: str
    settings: Any
    manifest: dict[str, Any]
    dataset: dict[str, Any]
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, those of training."""
    asides: list[dict[str, Any]]
    """The others: what validations and evaluations found."""
    validations: list[Measured]
    examinations: list[Examined]
    unexamined: dict[int, str]
    """Why the steps that have no scores have none."""

    @classmethod
    def read(cls, folder: Path, dataset: Mapping[str, Any], *, courses: bool = True) -> Run:
        """courses: whether validations and examinations are read, which takes longer."""
        file = folder / "config.yaml"
        config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        manifest = read_json(folder / "manifest.json")
        known = manifest.pop("dataset", {})
        lines = [line for line in read_metrics(folder / "metrics.jsonl") if _is_of_a_step(line)]
        scored = folder / "eval" / "steps"
        return cls(
            folder,
            config,
            _yaml(config),
            manifest,
            {**(known if isinstance(known, dict) else {}), **dataset},
            [line for line in lines if "loss" in line],
            [line for line in lines if "loss" not in line],
            overfitting.read(folder / "validation") if courses else [],
            examination.read(scored) if courses else [],
            examination.failures(scored) if courses else {},
        )

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key, None where there is none."""
        return setting_of(self.settings, key)

    def number(self, key: str) -> int | float | None:
        """A setting that is a finite number; None for any other."""
        return finite(self.setting(key))

    def column(self, key: str) -> list[float]:
        """One value of every logged line; nan where a line has none."""
        return [_float(line.get(key)) for line in self.lines]

    @property
    def steps(self) -> list[float]:
        return self.column("step")

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint."""
        step = read_json(self.folder / "checkpoints" / "best.json").get("step")
        return step if isinstance(step, int) else None

    @property
    def taken(self) -> int | None:
        """The step whose weights the run ends with, where that is the best."""
        return self.best if self.setting("validation.use_best") else None

    @property
    def metric(self) -> Metric:
        """The held-out loss that chooses the best step, or would if no score of pictures did."""
        return overfitting.loss_of(self.setting("validation.metric"))


def setting_of(settings: Any, key: str) -> Any:
    """A value of a configuration by its dotted key, None where there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def finite(value: Any) -> int | float | None:
    """The value where it is a finite number, and no truth value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return value if is_number and math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _float(value: Any) -> float:
    """As it is, infinite perhaps; nan for what is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    number = finite(value)
    return math.nan if number is None else float(number)


def _is_of_a_step(line: Mapping[str, Any]) -> bool:
    return finite(line.get("step")) is not None


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
