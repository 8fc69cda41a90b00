"""Evaluated runs, or checkpoints of one run, against each other on the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.clip_score import points
from eval.scores import FORMAT
from eval.significance import Paired, hint, holm, paired
from train.config import UserError

ARM = "finetuned"
FORGETTING = "forgetting"
CLEAR = 0.05  # of p, of all tests together
# What must be equal for two pictures of one prompt and seed to differ by the model alone. The
# subject has a word of its own in each run; what may differ otherwise is what is compared.
_ALIKE = ("protocol", "noun", "steps", "guidance", "seed", "resize", "scheduler", "dtype")
_IN_POINTS = ("clip_score", "clip_t")  # shown in points, stored as cosines like all others
_TITLES = {"clip_score": "CLIP score", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}

Key = tuple[str, int, int, int]  # prompt, seed, width, height


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
        """The fine-tuned model's picture; None where it is gone."""
        path = self.file.parent / sample["pictures"][ARM]
        return path if path.is_file() else None


@dataclass(frozen=True)
class Test:
    """One score of two sides over the same prompts and seeds, in the unit it is shown in."""

    score: str
    title: str
    better: Literal["less", "more"] | None
    first: str
    second: str
    means: tuple[float, float]
    """Over prompts."""
    change: Paired
    p: float
    """Of the change, raised for all tests that were made (Holm)."""
    pictures: int
    hint: str

    @property
    def clear(self) -> bool:
        return self.p <= CLEAR

    @property
    def improved(self) -> int:
        """1 where the second is clearly better, -1 worse, else 0."""
        if not self.clear or self.better is None:
            return 0
        return (1 if self.change.difference > 0 else -1) * (1 if self.better == "more" else -1)


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
    known = sorted(int(file.stem.removeprefix("step-")) for file in folder.glob("step-*.json"))
    for step in steps:
        if step not in known:
            there = f"; there are {', '.join(map(str, known))}" if known else ", nor any other"
            raise UserError(f"steps: {run} was not evaluated at step {step}{there}")
    files = [folder / f"step-{step:08d}.json" for step in steps]
    return [
        Side(f"step {step}", file, {"samples": _named(file.with_suffix("")), **_read(file)})
        for step, file in zip(steps, files, strict=True)
    ]


def check(sides: Sequence[Side]) -> None:
    """Raises UserError at the first thing in which any differs from the first."""
    first, *others = sides
    for other in others:
        for what, one, two in _differences(first, other):
            raise UserError(
                f"{first.name} and {other.name} cannot be compared: {what} is {one} and {two}; "
                "evaluate both alike"
            )


def notes(sides: Sequence[Side]) -> list[str]:
    """What does not forbid the comparison and must be known beside it."""
    found = []
    settings = [side.metrics.get("settings", {}) for side in sides]
    if len({str(each.get("device")) for each in settings}) > 1:
        found.append("The pictures were made on different kinds of device, which moves them a bit.")
    training = {str((side.metrics.get("training") or {}).get("sha256")) for side in sides}
    if len(training) > 1 and not all(side.metrics.get("reference") for side in sides):
        found.append(
            "They were trained on different pictures, and likeness to the subject was measured "
            "against those: hold the same ones out for both, evaluation.path=DIR."
        )
    return found


def compare(sides: Sequence[Side]) -> list[Test]:
    """Every score that each picture has, of every later side against the first; p-values for all
    of these tests together."""
    first, *others = sides
    found = [test for other in others for test in _tests(first, other)]
    raised = holm([test.change.p for test in found])
    return [Test(**{**vars(test), "p": p}) for test, p in zip(found, raised, strict=True)]


def unpaired(sides: Sequence[Side], tests: Sequence[Test]) -> dict[str, list[Mapping | None]]:
    """The scores of whole sets, by name: each side's value with its interval, None without one."""
    tested = {test.score for test in tests}
    found: dict[str, list[Mapping | None]] = {}
    values = [_values(side) for side in sides]
    for name in dict.fromkeys(name for each in values for name in each):
        if name not in tested:
            found[name] = [each.get(name) for each in values]
    return found


def about(sides: Sequence[Side], name: str) -> Mapping[str, Any]:
    """A score's title, direction and so on, from the first side that has it."""
    of = (side.metrics.get("scores", {}).get(name) for side in sides)
    known: Mapping[str, Any] = next((score for score in of if score), {})
    return {"title": _TITLES.get(name, name.replace("_", " ")), "better": None, **known}


def matched(sides: Sequence[Side]) -> list[list[Mapping[str, Any]]]:
    """For each prompt and seed that all have: the sample of each side."""
    samples = [side.samples() for side in sides]
    return [[of[key] for of in samples] for key in samples[0] if all(key in of for of in samples)]


def value(name: str, sample: Mapping[str, Any]) -> float:
    """A sample's score in the unit it is shown in."""
    raw = sample["distance"] if name == FORGETTING else sample["scores"][name][ARM]
    return float(points(np.array(raw))) if name in _IN_POINTS else float(raw)


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
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); evaluate again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold an evaluation; evaluate again")
    return content


def _named(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"picture {int(file.stem)}",
            "seed": int(file.stem),
            "size": [0, 0],
            "pictures": {ARM: f"{folder.name}/{file.name}"},
            "scores": {},
        }
        for file in sorted(folder.glob("*.png"))
        if file.stem.isdigit()
    ]


def _key(sample: Mapping[str, Any], subject: str | None) -> Key:
    prompt = sample["prompt"]
    width, height = sample["size"]
    return (prompt.replace(subject, "{}") if subject else prompt, sample["seed"], width, height)


def _differences(first: Side, second: Side) -> Iterator[tuple[str, object, object]]:
    """What, and what it is in each."""
    ours, theirs = first.metrics, second.metrics
    for use in ours.get("extractors", {}).keys() & theirs.get("extractors", {}).keys():
        yield from _unlike(f"the extractor of {use}, its", ours, theirs, "extractors", use)
    if ours.get("reference") and theirs.get("reference"):
        yield from _unlike("of the held-out pictures, the", ours, theirs, "reference")
    settings = [metrics.get("settings", {}) for metrics in (ours, theirs)]
    for name in _ALIKE:
        if settings[0].get(name) != settings[1].get(name):
            yield f"settings.{name}", settings[0].get(name), settings[1].get(name)
    samples = [side.samples() for side in (first, second)]
    for mine, others, said in ((0, 1, ("there", "missing")), (1, 0, ("missing", "there"))):
        for key in samples[mine]:
            if key not in samples[others]:
                prompt, seed, width, height = key
                yield f"the picture of {prompt!r}, seed {seed}, {width}x{height},", *said


def _unlike(
    what: str, first: Mapping, second: Mapping, *path: str
) -> Iterator[tuple[str, object, object]]:
    for step in path:
        first, second = first[step] or {}, second[step] or {}
    for name in ("sha256", "resize", "dimension", "pictures"):
        if first.get(name) != second.get(name):
            yield f"{what} {name}", first.get(name), second.get(name)


def _tests(first: Side, second: Side) -> Iterator[Test]:
    pairs = _pairs(first, second, "samples")
    own = [set(sample.get("scores") or ()) for pair in pairs for sample in pair]
    shared = set.intersection(*own) if own else set()
    for name in sorted(shared, key=_order(first)):
        having = [pair for pair in pairs if all(ARM in each["scores"][name] for each in pair)]
        if having:
            yield _test(name, first, second, having)
    general = _pairs(first, second, "general")
    # Where they were asked for other scenes, what is left over may be anything.
    whole = len(general) == len(first.samples("general")) == len(second.samples("general"))
    if general and whole and all("distance" in sample for pair in general for sample in pair):
        yield _test(FORGETTING, first, second, general)


def _test(name: str, first: Side, second: Side, pairs: Sequence[tuple[Mapping, Mapping]]) -> Test:
    rows = np.array([[value(name, sample) for sample in pair] for pair in pairs])  # (N, 2)
    groups = np.array([one["prompt"] for one, _ in pairs])
    change = paired(rows[:, 0], rows[:, 1], groups)
    means = [float(np.mean([rows[groups == g, k].mean() for g in set(groups)])) for k in (0, 1)]
    known = about([first, second], name)
    return Test(
        score=name,
        title="Distance from base" if name == FORGETTING else known["title"],
        better="less" if name == FORGETTING else known["better"] or "more",
        first=first.name,
        second=second.name,
        means=(means[0], means[1]),
        change=change,
        p=change.p,
        pictures=len(pairs),
        hint=hint(rows[:, 1] - rows[:, 0], groups),
    )


def _pairs(first: Side, second: Side, kind: str) -> list[tuple[Mapping, Mapping]]:
    ours, theirs = first.samples(kind), second.samples(kind)
    return [(ours[key], theirs[key]) for key in ours if key in theirs]


def _order(side: Side) -> Callable[[str], tuple[int, str]]:
    """The order in which the evaluation told the scores."""
    told = list(side.metrics.get("scores", {}))
    return lambda name: (told.index(name) if name in told else len(told), name)


def _values(side: Side) -> dict[str, Mapping]:
    """By score: {"value", and "low" and "high" where known}."""
    plain = side.metrics.get("metrics") or {}
    found: dict[str, Mapping] = {k: {"value": v} for k, v in plain.items() if v is not None}
    for name, score in side.metrics.get("scores", {}).items():
        if ARM in score["values"]:
            found[name] = score["values"][ARM]
    return found
