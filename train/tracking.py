"""Where the numbers of a run go: metrics.jsonl always, dashboards where asked for."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from train import dashboards
from train.config import RunFailed, TrackingConfig
from train.dashboards import Dashboard, warn

if TYPE_CHECKING:
    from torch import nn

    from train.previews import Previews

_HELD_LINES = 100_000  # that a full disk does not take
_METHODS = ("dreambooth", "textual_inversion", "full", "lora")  # of which some have a LoRA too


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any]) -> None: ...

    def finish(self, *, failed: bool = False) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON line per logged step, on the disk as soon as it is logged.

    Resuming drops the lines after the resumed step. Raises RunFailed where it cannot be written to
    begin with. Later, where the disk is full, lines wait in memory until it takes them: they are
    worth less than the run.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=_HELD_LINES)
        self._file: FileIO | None = None
        self._end, self._failed = 0, ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = read_metrics(path) if start else []  # that starts anew measures its base anew
            self._begin([line for line in known if line.get("step", 0) <= start])
        except OSError as error:
            raise RunFailed(
                f"{path} cannot be written ({error.strerror or error}): free space, or make it "
                "writable; the same command goes on"
            ) from None

    def _begin(self, lines: list[dict[str, Any]]) -> None:
        temporary = self._path.with_suffix(".writing")
        with temporary.open("wb") as file:
            file.write(b"".join(map(_encoded, lines)))
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
        temporary.replace(self._path)

    def log(self, metrics: dict[str, Any]) -> None:
        self._waiting.append(_encoded(metrics))
        self._write()

    def finish(self, *, failed: bool = False) -> None:
        self._write()
        if self._waiting:
            warn(f"{len(self._waiting)} lines of {self._path} are missing ({self._failed})")
        self._close()

    def _write(self) -> None:
        """All that waits, or nothing."""
        text = b"".join(self._waiting)
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
                self._file.truncate(self._end)  # what a full disk took of a line
            if self._file.write(text) != len(text):
                raise OSError("no space left for a whole line")
            self._end += len(text)
            self._waiting.clear()
        except OSError as error:
            if not self._failed:
                warn(f"{self._path} cannot be written now ({error}): its lines wait in memory")
            self._failed = str(error)
            self._close()

    def _close(self) -> None:
        """Leaves the file with whole lines."""
        with suppress(OSError):
            if self._file is not None:
                self._file.truncate(self._end)
                self._file.close()
        self._file = None


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


class Trackers:
    """All trackers of a run as one; without any (on the other processes) it does nothing.

    As a context it finishes them, as those of a run that failed where it is left by an error.
    """

    def __init__(self, trackers: list[Tracker], *, artifacts: bool = False) -> None:
        """artifacts: whether dashboards are given what the run has made."""
        self._trackers, self._artifacts = trackers, artifacts
        self._takes_norms = True

    @property
    def _dashboards(self) -> list[Dashboard]:
        return [tracker for tracker in self._trackers if isinstance(tracker, Dashboard)]

    def log(self, metrics: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(metrics)

    def previews(self, step: int, previews: Previews) -> None:
        """Those of a step, beside the base's."""
        for board in self._dashboards:
            board.show("previews", step=step, pictures=previews.shown(step))

    def norms(self, step: int, model: nn.Module) -> None:
        """How long what trains is, by block. Where that fails, as for lack of memory, it is one
        warning and that they are left out."""
        if not (self._dashboards and self._takes_norms):
            return
        from train import norms

        try:
            found = norms.of(model)
        except Exception as error:
            self._takes_norms = False
            first = str(error).partition("\n")[0]
            warn(f"dashboards go on without norms ({first})")
            return
        for board in self._dashboards:
            board.show("norms", step=step, blocks=found)

    def deliver(self, output: Path, settings: Mapping[str, Any]) -> None:
        """What a run that is through has made."""
        for board in self._dashboards if self._artifacts else []:
            for name, kind, paths in made_by(output, settings):
                board.show("artifact", name=name, kind=kind, paths=paths)

    def finish(self, *, failed: bool = False) -> None:
        for tracker in self._trackers:
            if not isinstance(tracker, Dashboard):
                tracker.finish(failed=failed)
        dashboards.finish(self._dashboards, failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(failed=kind is not None)


def open_trackers(
    output: Path, settings: dict[str, Any], config: TrackingConfig, *, start: int, main: bool
) -> Trackers:
    """metrics.jsonl and the configured dashboards, on the main process only."""
    if not main:
        return Trackers([])
    trackers: list[Tracker] = [MetricsFile(output / "metrics.jsonl", start=start)]
    hello = introduction(output, settings, config, start=start)
    trackers += [Dashboard(name, hello) for name in shown_on(config)]
    return Trackers(trackers, artifacts=config.artifacts)


def shown_on(config: TrackingConfig) -> list[str]:
    """The dashboards that are wanted, each once."""
    return [] if config.mode == "disabled" else list(dict.fromkeys(config.trackers))


def introduction(
    output: Path, settings: Mapping[str, Any], config: TrackingConfig, *, start: int | None = None
) -> dict[str, Any]:
    """What dashboards are told of a run first (train/boards.py, `Hello`). start: the step that it
    goes on from; None where its training is over."""
    return {
        "output": str(output.absolute()),
        "settings": dict(settings),
        "project": config.project,
        "name": config.name or output.absolute().name,
        "entity": config.entity,
        "group": config.group,
        "tags": config.tags,
        "job": method_of(settings),
        "offline": config.mode == "offline",
        "start": start,
    }


def method_of(settings: Mapping[str, Any]) -> str | None:
    """The entry's name, from what only its configuration has; None where nothing tells."""
    return next((name for name in _METHODS if settings.get(name) is not None), None)


def add_scores(
    output: Path, settings: Mapping[str, Any], config: TrackingConfig, metrics: Mapping[str, Any]
) -> None:
    """Shows an evaluation with the run that it is of, on the run's dashboards; costs a bounded time
    and never an error. metrics: as eval/metrics.json has them."""
    hello = introduction(output, settings, config)
    boards = [Dashboard(name, hello) for name in shown_on(config)]
    report = output / "eval" / "report.html"
    for board in boards:
        board.show("scores", rows=list(score_rows(metrics)))
        if config.artifacts and report.is_file():
            board.show("artifact", name="evaluation", kind="report", paths=[str(report.absolute())])
    dashboards.finish(boards)


def score_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each score: the fine-tuned model's `value` from `low` to `high`, the base's, and
    the change from that."""
    for name, score in metrics.get("scores", {}).items():
        value = score["values"].get("finetuned")
        if value is None:
            continue
        change = score.get("change") or {}
        yield {
            "metric": name,
            "better": score.get("better"),
            "base": (score["values"].get(score.get("against", "base")) or {}).get("value"),
            **{key: value.get(key) for key in ("value", "low", "high")},
            "change": change.get("value"),
            "change_low": change.get("low"),
            "change_high": change.get("high"),
            "verdict": _verdict(score.get("better"), change),
        }


def _verdict(better: str | None, change: Mapping[str, Any]) -> str | None:
    """As eval/scores.py judges a change."""
    if better is None or not change:
        return None
    unsure = (change.get("p") or 0) > 0.05
    side = 0 if unsure else int(change["low"] > 0) - int(change["high"] < 0)
    return {0: "unclear", 1: "better", -1: "worse"}[side if better == "more" else -side]


def made_by(output: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, kind and paths of what is to be kept of a run that is through: the account of its
    pictures, its report and, as that is large, its result last."""
    data = settings.get("data") or {}
    sources = [source.get("path") for source in data.get("sources") or ()] or [data.get("path")]
    named = {
        ("dataset", "dataset"): [output / "manifest.json", *_reports_of(filter(None, sources))],
        ("report", "report"): [output / "report.html"],
        **{(name, "model"): [output / name] for name in ("adapter", "full")},
    }
    for (name, kind), paths in named.items():
        there = [str(path.absolute()) for path in paths if path.exists()]
        if there:
            yield name, kind, there


def _reports_of(sources: Iterable[str]) -> list[Path]:
    """Those that scripts/prepare.py wrote beside or into folders of pictures, of one if there are
    several: files of an artifact have names of their own."""
    for source in map(Path, sources):
        for folder in (source, source.parent):
            if (folder / "report.json").is_file() and (folder / "pictures.jsonl").is_file():
                return [folder / "report.json", folder / "report.html"]
    return []


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a metrics.jsonl; a line torn by a kill is left out."""
    lines: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                lines.append(value)
    return lines
