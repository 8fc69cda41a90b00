"""Evaluated runs, or checkpoints of one run, against each other on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval.clip_score import points
from eval.evaluated_runs import ARM, Side
from eval.significance import Paired, hint, holm, paired
from train.config import UserError

FORGETTING, CLASS = "forgetting", "prior_preservation"
CLEAR = 0.05  # of p, of all tests together
# What must be equal for two pictures of one prompt and seed to differ by the model alone. The
# subject has a word of its own in each run; what may differ otherwise is what is compared.
_ALIKE = ("protocol", "noun", "steps", "guidance", "seed", "resize", "scheduler", "dtype")
_IN_POINTS = ("clip_score", "clip_t")  # shown in points, stored as cosines like all others
_TITLES = {"clip_score": "CLIP score", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
_TITLES |= {CLASS: "Class turned into the subject"}


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


def value(name: str, sample: Mapping[str, Any]) -> float:
    """A sample's score in the unit it is shown in."""
    raw = sample["distance"] if name == FORGETTING else sample["scores"][name][ARM]
    return float(points(np.array(raw))) if name in _IN_POINTS else float(raw)


def _differences(first: Side, second: Side) -> Iterator[tuple[str, object, object]]:
    """What, and what it is in each."""
    ours, theirs = first.metrics, second.metrics
    for use in ours.get("extractors", {}).keys() & theirs.get("extractors", {}).keys():
        yield from _unlike(f"the extractor of {use}, its", ours, theirs, "extractors", use)
    one, other = ("given" if each.get("reference") else "missing" for each in (ours, theirs))
    if one != other:
        # Likeness is to these pictures, or else to those trained on.
        yield "evaluation.path, the held-out pictures,", one, other
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
    prior = _whole(first, second, "prior")
    if prior and all(CLASS in sample.get("scores", {}) for pair in prior for sample in pair):
        yield _test(CLASS, first, second, prior)
    general = _whole(first, second, "general")
    if general and all("distance" in sample for pair in general for sample in pair):
        yield _test(FORGETTING, first, second, general)


def _test(name: str, first: Side, second: Side, pairs: Sequence[tuple[Mapping, Mapping]]) -> Test:
    rows = np.array([[value(name, sample) for sample in pair] for pair in pairs])  # (N, 2)
    # The class has few prompts: each of its pictures is one draw.
    groups = np.array([k if name == CLASS else one["prompt"] for k, (one, _) in enumerate(pairs)])
    change = paired(rows[:, 0], rows[:, 1], groups)
    means = [float(np.mean([rows[groups == g, k].mean() for g in set(groups)])) for k in (0, 1)]
    known = about([first, second], name)
    return Test(
        score=name,
        title="Distance from base" if name == FORGETTING else known["title"],
        better="less" if name in (FORGETTING, CLASS) else known["better"] or "more",
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


def _whole(first: Side, second: Side, kind: str) -> list[tuple[Mapping, Mapping]]:
    """Their pairs; none where they were asked for other scenes: what is left may be anything."""
    pairs = _pairs(first, second, kind)
    whole = len(pairs) == len(first.samples(kind)) == len(second.samples(kind))
    return pairs if whole else []


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
