"""The runs of a sweep: one for each setting of a grid or of a draw at random, and each seed.

Nothing here is heavy.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from train.config import Section, UserError, load

_DIGITS = 4  # of a number that was drawn
_KEPT = re.compile(r"[^A-Za-z0-9.+-]+")


class RangeConfig(Section):
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    log: bool = False
    """Draw the logarithm evenly: as many values between 1e-5 and 1e-4 as between 1e-4 and 1e-3."""
    whole: bool = False
    """Draw whole numbers."""
    choices: list[Any] = []
    """Draw one of these instead."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.choices:
            return self
        if self.low is None or self.high is None or self.low > self.high:
            raise ValueError("a range needs low and high, low not above high; or choices")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low} must be above 0 where log=true")
        return self

    def draw(self, source: random.Random) -> Any:
        if self.choices:
            return source.choice(self.choices)
        assert self.low is not None and self.high is not None
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        return round(value) if self.whole else float(f"{value:.{_DIGITS}g}")


class RandomConfig(Section):
    samples: int = Field(10, ge=1)
    """Settings to draw."""
    seed: int = 0
    """The same seed draws the same settings; more samples add to them."""
    ranges: dict[str, RangeConfig]
    """A range for each key."""


class SweepFile(Section):
    """What a sweep's file says."""

    output: Path
    """The folder of the sweep, with a folder for each run."""
    entry: str = "train/lora.py"
    """What trains."""
    launcher: list[str] = []
    """Words before the entry, like [accelerate, launch, --num_processes=2]; default Python."""
    arguments: list[str] = []
    """What every run is given: --config=FILE and key=value."""
    grid: dict[str, list[Any]] = {}
    """Every combination of these values of these keys."""
    random: RandomConfig | None = None
    """Settings drawn at random, each with each combination of the grid."""
    seeds: list[int] = []
    """Each setting once with each seed; the ranking is of their means."""
    metric: str = "validation/loss"
    """What runs are ranked by: a number of metrics.jsonl, or a score of eval/metrics.json."""
    better: Literal["less", "more"] = "less"
    """Which way is better."""

    @model_validator(mode="after")
    def _varies(self) -> Self:
        if not (self.grid or self.random or self.seeds):
            raise ValueError("a sweep needs grid, random or seeds")
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid: {empty[0]} has no values")
        return self


class SweepConfig(Section):
    """Trains once for each setting of a sweep and ranks the results (scripts/sweep.py)."""

    sweep: Path
    """The sweep's file."""
    launch: Literal["local", "slurm", "none"] = "local"
    """local: on this machine; slurm: as an array of jobs; none: only rank what is there."""
    parallel: int | None = Field(None, ge=1)
    """Runs at a time, by default 1 on this machine, where each gets a GPU of its own as far as they
    go, and as many as SLURM will on a cluster."""
    sbatch: list[str] = []
    """Options for sbatch, like [--time=2:00:00, --partition=short]."""
    dry_run: bool = False
    """Print the commands and train nothing."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    folder: Path
    values: Mapping[str, Any]
    """Of the keys that differ between settings."""
    seed: int | None
    words: Sequence[str]
    """The entry and its arguments."""

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return any((self.folder / name).is_dir() for name in ("adapter", "full"))


def read(path: Path) -> SweepFile:
    if not path.is_file():
        raise UserError(f"sweep={path} is not a file; see configs/sweeps")
    sweep = load(SweepFile, [f"--config={path}"])
    if not Path(sweep.entry).is_file():
        raise UserError(f"entry: {sweep.entry} is not here; start this in the repository's folder")
    return sweep


def runs_of(sweep: SweepFile, extra: Sequence[str]) -> list[SweepRun]:
    """All of them, the seeds of a setting together. extra: arguments of every run after the
    file's."""
    fixed = ("output", "tracking.group", "tracking.tags")
    for key in (word.partition("=")[0] for word in [*sweep.arguments, *extra]):
        if key in fixed:
            raise UserError(f"{key} is given to each run by the sweep: leave it out")
    found: dict[str, SweepRun] = {}
    for values in settings(sweep):
        seeds: list[int | None] = [*sweep.seeds] or [None]
        for seed in seeds:
            run = _run(sweep, values, seed, extra)
            if run.name in found:
                raise UserError(f"two settings of the sweep are called {run.name}: drop one")
            found[run.name] = run
    return list(found.values())


def settings(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """The values of each."""
    combinations = itertools.product(*sweep.grid.values())
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in combinations]
    for drawn in _drawn(sweep.random) if sweep.random else [{}]:
        for values in grid:
            yield {**drawn, **values}


def _drawn(config: RandomConfig) -> list[dict[str, Any]]:
    source = random.Random(config.seed)
    ranges = config.ranges.items()
    found = [{key: each.draw(source) for key, each in ranges} for _ in range(config.samples)]
    return list({json.dumps(values): values for values in found}.values())


def _run(
    sweep: SweepFile, values: Mapping[str, Any], seed: int | None, extra: Sequence[str]
) -> SweepRun:
    tags = [f"{short}-{_plain(values[key])}" for key, short in shortened(list(values)).items()]
    tags += [f"seed-{seed}"] if seed is not None else []
    name = "_".join(tags)
    folder = sweep.output / name
    given = [f"{key}={_text(value)}" for key, value in values.items()]
    given += [f"seed={seed}"] if seed is not None else []
    told = [f"tracking.group={sweep.output.name}", f"tracking.tags={json.dumps(tags)}"]
    words = [sweep.entry, *sweep.arguments, *extra, *given, f"output={folder}", *told]
    return SweepRun(name, folder, values, seed, words)


def shortened(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last part, where that is its alone."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)
    }


def _plain(value: Any) -> str:
    """As it can stand in a folder's name."""
    return _KEPT.sub("-", _text(value)).rstrip("-") or "empty"  # in front it may be a minus


def _text(value: Any) -> str:
    """As YAML reads it back."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return json.dumps(value)
