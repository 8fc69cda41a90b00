"""Runs below a folder, each in a few numbers: what scripts/runs.py lists.

Only light files are read, and no torch: a thousand runs take seconds.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from train import run_figures, using
from train.config import UserError
from train.run_record import Run, finite, read_json, setting_of
from train.run_state import State, state_of

_DEEP = 3  # folders below the root
_FILES = ("config.yaml", "metrics.jsonl", "manifest.json")
_MOST = 20_000  # entries of a folder that are looked at


class Score(NamedTuple):
    """Of an evaluation, the fine-tuned model's."""

    title: str
    better: str | None
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; None for what is not known."""

    name: str
    """Its folder, as seen from where runs were looked for."""
    folder: Path
    state: State
    method: str
    base: str
    done: int
    """Optimizer steps that are logged."""
    planned: int | None
    images: int | None
    loss: float | None
    """Smoothed training loss at the end."""
    held_out: float | None
    """The lowest held-out loss, with its standard error and the step it was at."""
    held_out_error: float | None
    held_out_step: int | None
    scores: Mapping[str, Score]
    speed: float | None
    """Images per second."""
    seconds: float | None
    """That its steps took."""
    ended: float | None
    """When its last line was written, in seconds since 1970."""
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        values = {**vars(self), "folder": str(self.folder), "state": self.state.name}
        values["detail"] = self.state.detail
        values["scores"] = {name: score._asdict() for name, score in self.scores.items()}
        values["ended"] = moment(self.ended) if self.ended is not None else None
        del values["settings"]
        return values


def find(root: Path) -> tuple[list[Path], list[str]]:
    """The run directories below `root`, or itself, by name; and what was passed over, with why."""
    if not root.is_dir():
        raise UserError(f"root={root}: no such folder; give the one that holds the runs")
    found: list[Path] = []
    skipped: list[str] = []
    _walk(root, 0, found, skipped)
    return sorted(found), skipped


def summaries(
    root: Path, *, wanted: Sequence[str] = (), sort: str = "ended", reverse: bool = False
) -> tuple[list[Summary], list[str]]:
    """The runs below `root` that fit all of `wanted`, and what was passed over, with why.

    wanted: parts of names, or key=value of configurations. sort: as `ORDERS`, or a score. Raises
    UserError for a key or a sort that no run has.
    """
    folders, skipped = find(root)
    runs: list[Summary] = []
    for folder in folders:
        name = str(folder.relative_to(root)) if folder != root else folder.absolute().name
        try:
            run = Run.read(folder, {}, courses=False)
            if is_run(run):
                runs.append(summary(run, name))
            else:
                skipped.append(f"{name} (its config.yaml is missing, torn or not of a run)")
        except (ValueError, TypeError, OSError, OverflowError) as error:
            skipped.append(f"{name} (cannot be read: {error})")
    _check_keys(wanted, runs)
    fitting = [run for run in runs if all(_fits(run, each) for each in wanted)]
    return ordered(fitting, sort, reverse=reverse), skipped


def is_run(run: Run) -> bool:
    """Whether its config.yaml is that of a run."""
    return isinstance(run.settings, dict) and isinstance(run.settings.get("train"), dict)


def _check_keys(wanted: Sequence[str], runs: Sequence[Summary]) -> None:
    """Raises UserError for a key that no run's configuration has."""
    asked = [each for each in wanted if "=" in each]
    known = {key for run in runs for key in _keys(run.settings)} if asked else set()
    for each in asked if known else ():
        key = each.partition("=")[0]
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            remedy = f"the nearest is {near[0]}" if near else "a run's config.yaml names them all"
            raise UserError(f"filter={each}: no run has a setting {key}; {remedy}")


def _keys(settings: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The dotted keys of settings and of their sections."""
    for name, value in settings.items():
        yield f"{before}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{before}{name}.")


def summary(run: Run, name: str) -> Summary:
    """A run in a few numbers."""
    done = int(run.steps[-1]) if run.lines else 0
    steps = run.number("train.steps")
    planned = None if steps is None else int(steps)
    best = _best_held_out(run)
    return Summary(
        name=name,
        folder=run.folder,
        state=state_of(run.folder, done=done, planned=planned),
        method=using.method(run).replace("_", " "),
        base=Path(str(run.setting("model.path") or "")).name,
        done=done,
        planned=planned,
        images=run_figures.images_seen(run),
        loss=run_figures.final_loss(run),
        held_out=best.get("validation/loss"),
        held_out_error=finite(best.get("validation/loss_se")),
        held_out_step=int(best["step"]) if best else None,
        scores=_scores(run.folder),
        speed=run_figures.pace(run)[0] or None,
        seconds=run_figures.training_seconds(run),
        ended=_ended(run.folder),
        settings=run.settings,
    )


ORDERS = (
    *("name", "state", "method", "base", "steps", "images", "loss", "held_out", "speed"),
    *("time", "ended"),
)

_DESCENDING = ("steps", "images", "speed", "time", "ended")
_FIELDS = {"steps": "done", "time": "seconds"}


def ordered(runs: Sequence[Summary], sort: str, *, reverse: bool = False) -> list[Summary]:
    """Best, newest, most or first by name before the others; those without the number last."""
    scores = {name: score.better for run in runs for name, score in run.scores.items()}
    if runs and sort not in ORDERS and sort not in scores:
        known = ", ".join([*ORDERS, *scores])
        raise UserError(f"sort={sort}: give one of {known}")
    falls = (sort in _DESCENDING or scores.get(sort) == "more") != reverse

    def key(run: Summary) -> Any:
        if sort in scores:
            return run.scores[sort].value if sort in run.scores else None
        found = getattr(run, _FIELDS.get(sort, sort))
        return found.name if isinstance(found, State) else found

    having = [run for run in runs if key(run) is not None]
    rest = [run for run in runs if key(run) is None]
    return [*sorted(having, key=key, reverse=falls), *rest]


def flat(settings: Any, before: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    if not isinstance(settings, Mapping) or not settings:
        return {before: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{before}.{name}" if before else str(name))
    return found


def moment(seconds: float) -> str:
    """Local time to the minute."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _walk(folder: Path, depth: int, found: list[Path], skipped: list[str]) -> bool:
    """Whether there is a run in it."""
    try:
        with os.scandir(folder) as entries:
            listed = [entry for entry, _ in zip(entries, range(_MOST), strict=False)]
    except OSError as error:
        skipped.append(f"{folder.name} ({error.strerror or error})")
        return False
    if any(entry.name in _FILES for entry in listed):
        found.append(folder)
        return True
    # A link may lead back to where one has come from.
    folders = [e.name for e in listed if e.is_dir(follow_symlinks=False)]
    folders = [name for name in sorted(folders) if not name.startswith(".")]
    if depth == _DEEP:
        return False
    below: list[str] = []
    has = [_walk(folder / name, depth + 1, found, below) for name in folders]
    if depth == 0:
        alien = [name for name, one in zip(folders, has, strict=True) if not one]
        skipped += [f"{name} (no run)" for name in alien]
        skipped += [f"{e.name} (a link)" for e in listed if e.is_symlink() and e.is_dir()]
    return any(has)


def _fits(run: Summary, wanted: str) -> bool:
    key, is_setting, value = wanted.partition("=")
    if not is_setting:
        return wanted.lower() in run.name.lower()
    there = setting_of(run.settings, key)
    if isinstance(there, bool) or there is None:
        return value == {True: "true", False: "false", None: "null"}[there]
    if isinstance(there, int | float):
        try:
            return float(value) == there
        except ValueError:
            return False
    return str(there) == value


def _best_held_out(run: Run) -> dict[str, Any]:
    lines = [line for line in run.asides if finite(line.get("validation/loss")) is not None]
    return min(lines, key=lambda line: line["validation/loss"], default={})


def _scores(folder: Path) -> dict[str, Score]:
    found = {}
    content = read_json(folder / "eval" / "metrics.json").get("scores")
    for name, score in content.items() if isinstance(content, dict) else ():
        try:
            value = score["values"]["finetuned"]
            found[name] = Score(
                str(score["title"]),
                score["better"],
                float(value["value"]),
                finite(value.get("low")),
                finite(value.get("high")),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return found


def _ended(folder: Path) -> float | None:
    try:
        return (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return None
