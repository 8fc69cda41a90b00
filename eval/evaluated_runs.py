"""What is compared: evaluated runs, or checkpoints of one run, as their files tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.wording import whole_words
from eval.generation import read_settings
from eval.scores import FORMAT
from train.config import UserError

ARM = "finetuned"
_UNKNOWN = [0, 0]  # the size of a picture whose prompt, seed and size no file tells
# Of what a picture says it was made with, what the evaluation says of all of them.
_MADE_WITH = ("steps", "guidance", "scheduler", "weights")

Key = tuple[str, int, int, int]  # prompt, seed, width, height


class Shape(BaseModel):
    """What a JSON file must hold at least; numbers are finite and not written as strings."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Pictures(Shape):
    finetuned: str


class _Scene(Shape):
    prompt: str
    seed: int
    size: list[int] = Field(min_length=2, max_length=2)
    distance: float = 0.0
    scores: dict[str, dict[str, float]] = {}


class _Sample(_Scene):
    pictures: _Pictures
    scores: dict[str, dict[str, float]]


class _Value(Shape):
    value: float
    low: float | None = None
    high: float | None = None


class _Score(Shape):
    title: str
    better: Literal["less", "more"] | None
    values: dict[str, _Value]


class _Settings(Shape):
    subject: str | None = None


class _Evaluation(Shape):
    """Of metrics.json, and of a checkpoint's file, which has no samples and `metrics` alone."""

    samples: list[_Sample] = []
    general: list[_Scene] | None = None
    prior: list[_Scene] | None = None
    scores: dict[str, _Score] = {}
    metrics: dict[str, float | None] = {}
    settings: _Settings = _Settings()
    extractors: dict[str, dict[str, Any]] = {}
    reference: dict[str, Any] | None = None
    training: dict[str, Any] | None = None


@dataclass(frozen=True)
class Side:
    """One of what is compared: a run, or a checkpoint of it."""

    name: str
    file: Path
    """The metrics.json, or eval/steps/step-N.json."""
    metrics: Mapping[str, Any]

    def samples(self, kind: str = "samples") -> dict[Key, Mapping[str, Any]]:
        """By prompt, in which the subject is called `{}`, seed and size."""
        subject = self.metrics.get("settings", {}).get("subject")
        return {_key(sample, subject): sample for sample in self.metrics.get(kind) or []}

    def picture(self, sample: Mapping[str, Any]) -> Path | None:
        """The fine-tuned model's picture; None where it is gone. UserError where it cannot be read
        or is not the one that was measured: a later evaluation may have been interrupted."""
        path = self.file.parent / sample["pictures"][ARM]
        if not path.is_file():
            return None
        if (other := _made_otherwise(path, sample, self.metrics.get("settings", {}))) is not None:
            raise UserError(
                f"{path} was made with another {other} than {self.file} is about; evaluate "
                f"{self.name} again"
            )
        return path


def read_runs(runs: Sequence[Path]) -> list[Side]:
    """The evaluations of runs, each called by its folder; by its path where two are alike."""
    names = [run.absolute().name for run in runs]
    several = len(set(names)) < len(names)
    return [
        Side(str(run) if several else name, run / "eval/metrics.json", _read_metrics(run))
        for run, name in zip(runs, names, strict=True)
    ]


def read_steps(run: Path, steps: Sequence[int]) -> list[Side]:
    """What was evaluated during training. Where a step has its numbers alone, its pictures are
    paired by their names, which are those of the same prompt and seed at each step."""
    folder = run / "eval/steps"
    names = (file.stem.removeprefix("step-") for file in folder.glob("step-*.json"))
    known = sorted(int(name) for name in names if name.isdecimal())
    for step in steps:
        if step not in known:
            there = f"; there are {', '.join(map(str, known))}" if known else ", nor any other"
            raise UserError(f"steps: {run} was not evaluated at step {step}{there}")
    files = [folder / f"step-{step:08d}.json" for step in steps]
    return [
        Side(f"step {step}", file, {"samples": _named(file.with_suffix("")), **_read(file)})
        for step, file in zip(steps, files, strict=True)
    ]


def matched(sides: Sequence[Side]) -> list[list[Mapping[str, Any]]]:
    """For each prompt and seed that all have: the sample of each side."""
    samples = [side.samples() for side in sides]
    return [[of[key] for of in samples] for key in samples[0] if all(key in of for of in samples)]


def parsed(file: Path, shape: type[Shape]) -> dict[str, Any]:
    """The JSON object of this shape in a file, also with what the shape does not name. Raises
    OSError, and ValueError with one line on what is wrong."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        shape.model_validate(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    return dict(content)


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type":
        what = "not a JSON object"
    return ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), what])


def _read_metrics(run: Path) -> dict[str, Any]:
    file = run / "eval/metrics.json"
    if not file.is_file():
        raise UserError(f"runs: {run} has no eval/metrics.json; run eval/evaluate.py run={run}")
    metrics = _read(file)
    if metrics.get("format") != FORMAT:
        raise UserError(
            f"{file} is of format {metrics.get('format', 1)}, not {FORMAT}; evaluate it again: "
            f"eval/evaluate.py run={run}"
        )
    if not metrics.get("samples") or metrics.get("kind") == "folders":
        raise UserError(f"{file} holds no prompts to pair; compare evaluated runs")
    return metrics


def _read(file: Path) -> dict[str, Any]:
    try:
        return parsed(file, _Evaluation)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); evaluate again") from None


def _named(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"picture {int(file.stem)}",
            "seed": int(file.stem),
            "size": _UNKNOWN,
            "pictures": {ARM: f"{folder.name}/{file.name}"},
            "scores": {},
        }
        for file in sorted(folder.glob("*.png"))
        if file.stem.isdigit()
    ]


def _key(sample: Mapping[str, Any], subject: str | None) -> Key:
    prompt, (width, height) = sample["prompt"], sample["size"]
    if subject:
        prompt = whole_words(subject).sub("{}", prompt)
    return prompt, sample["seed"], width, height


def _made_otherwise(path: Path, sample: Mapping[str, Any], settings: Mapping) -> str | None:
    """What the picture was made with that is not what its evaluation says; None also for a picture
    that says nothing, once it has been seen to be one."""
    from eval.features import read_rgb

    made = read_settings(path)
    if not isinstance(made, dict):
        read_rgb(path)
        return None
    if sample["size"] == _UNKNOWN:
        return None
    wanted = {name: sample[name] for name in ("prompt", "seed", "size")}
    wanted |= {name: settings[name] for name in _MADE_WITH if name in settings}
    return next((name for name in wanted if made.get(name) != wanted[name]), None)
