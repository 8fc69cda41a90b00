"""Which setting of a sweep is best: the mean over its seeds, and how much they differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.sweeping import SweepRun, shortened
from train.curves import CONFIDENT
from train.run_record import read_json
from train.tracking import read_metrics


@dataclass(frozen=True)
class Result:
    """The best value of one run."""

    value: float
    error: float | None
    """Its standard error, where the run knows one."""
    step: int | None


@dataclass(frozen=True)
class Ranked:
    """One setting."""

    values: Mapping[str, Any]
    mean: float
    """Over seeds; nan where no run that is done has a value."""
    spread: float | None
    """Standard deviation between seeds, or of one run its standard error."""
    steps: Sequence[int | None]
    """At which each run had its value."""
    runs: Sequence[str]
    seeds: int
    """How many runs have a value."""
    is_done: bool
    """Whether any of its runs is done: no other counts."""


def result_of(run: SweepRun, metric: str, better: str) -> Result | None:
    """The best value that a run has logged in training, or its evaluation's score; None where there
    is none. What was logged at step 0 is the base's."""
    pick = min if better == "less" else max
    logged = read_metrics(run.folder / "metrics.jsonl")
    lines = [line for line in logged if line.get("step") and _is_number(line, metric)]
    if lines:
        best = pick(lines, key=lambda line: line[metric])
        error = best[f"{metric}_se"] if _is_number(best, f"{metric}_se") else None
        return Result(best[metric], error, best["step"])
    score = (read_json(run.folder / "eval/metrics.json").get("scores") or {}).get(metric) or {}
    value = (score.get("values") or {}).get("finetuned") or {}
    if not _is_number(value, "value"):
        return None
    known = _is_number(value, "low") and _is_number(value, "high")
    error = (value["high"] - value["low"]) / (2 * CONFIDENT) if known else None
    return Result(value["value"], error, None)


def _is_number(line: Mapping[str, Any], name: str) -> bool:
    value = line.get(name)
    return isinstance(value, int | float) and math.isfinite(value)


def rank(runs: Sequence[SweepRun], metric: str, better: str) -> list[Ranked]:
    """The best setting first, after all others those without a value and those that are not
    done."""
    by_setting: dict[str, list[SweepRun]] = {}
    for run in runs:
        by_setting.setdefault(repr(sorted(run.values.items())), []).append(run)
    ranked = [_ranked(group, metric, better) for group in by_setting.values()]
    sign = 1 if better == "less" else -1
    return sorted(ranked, key=lambda one: (not one.is_done, math.isnan(one.mean), sign * one.mean))


def _ranked(runs: Sequence[SweepRun], metric: str, better: str) -> Ranked:
    done = [run for run in runs if run.is_done]
    found = [result for run in done if (result := result_of(run, metric, better))]
    values = [result.value for result in found]
    if len(values) > 1:
        spread: float | None = statistics.stdev(values)
    else:
        spread = found[0].error if found else None
    return Ranked(
        runs[0].values,
        statistics.fmean(values) if values else math.nan,
        spread,
        [result.step for result in found],
        [run.name for run in runs],
        len(values),
        bool(done),
    )


def table(ranked: Sequence[Ranked], metric: str) -> str:
    """For the terminal."""
    keys = list(ranked[0].values) if ranked else []
    short = shortened(keys)
    lines = [["", *(short[key] for key in keys), metric, "+-", "runs", "at step"]]
    for place, one in enumerate(ranked, 1):
        steps = ", ".join(str(step) for step in one.steps if step is not None)
        mean = f"{one.mean:.5g}" if not math.isnan(one.mean) else "none"
        numbers = [mean if one.is_done else "(not done)", f"{one.spread:.2g}" if one.spread else ""]
        values = [str(one.values[key]) for key in keys]
        number = f"{place}." if one.seeds else ""
        lines.append([number, *values, *numbers, f"{one.seeds}/{len(one.runs)}", steps])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    return [
        {
            "values": dict(one.values),
            "mean": None if math.isnan(one.mean) else one.mean,
            "spread": one.spread,
            "seeds": one.seeds,
            "done": one.is_done,
            "steps": list(one.steps),
            "runs": list(one.runs),
        }
        for one in ranked
    ]
