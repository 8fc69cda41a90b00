"""Where the numbers of a run go: metrics.jsonl always, dashboards where asked for."""

from __future__ import annotations

import json
import os
from collections import deque
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from train.config import RunFailed, TrackingConfig
from train.dashboards import Dashboard, warn

_HELD_LINES = 100_000  # that a full disk does not take


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

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(metrics)

    def finish(self, *, failed: bool = False) -> None:
        for tracker in self._trackers:
            tracker.finish(failed=failed)

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
    trackers += [
        Dashboard(name, output, settings, project=config.project) for name in config.trackers
    ]
    return Trackers(trackers)


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
