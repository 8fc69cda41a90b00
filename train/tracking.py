"""Where the numbers of a run go: metrics.jsonl always, dashboards where asked for."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any, Protocol

from train.config import TrackingConfig


class Tracker(Protocol):
    def log(self, metrics: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one JSON line per logged step. Resuming drops the lines after the resumed
    step."""

    def __init__(self, path: Path, *, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = read_metrics(path) if start else []  # a run that starts anew measures its base anew
        kept = [json.dumps(line) for line in known if line["step"] <= start]
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps(metrics) + "\n")

    def finish(self) -> None:
        self._file.close()


class Wandb:
    """A wandb run that is resumed with the run directory. Any failure is one warning, never the
    run's end."""

    def __init__(self, output: Path, settings: dict[str, Any], *, project: str) -> None:
        self._run: Any = None
        self._id = output / "wandb_id.txt"
        self._attempt(lambda: self._start(output, settings, project))

    def _start(self, output: Path, settings: dict[str, Any], project: str) -> None:
        import wandb

        if not self._id.exists():
            self._id.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=output.name,
            id=self._id.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(output),
            config=settings,
        )

    def log(self, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.log(metrics, step=metrics["step"]))

    def finish(self) -> None:
        if self._run is not None:
            self._attempt(self._run.finish)

    def _attempt(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a dashboard must never cost a night's training
            self._run = None
            print(f"warning: wandb is off for this run ({error})", file=sys.stderr)


class Trackers:
    """All trackers of a run as one; without any (on the other processes) it does nothing."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(metrics)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(
    output: Path, settings: dict[str, Any], config: TrackingConfig, *, start: int, main: bool
) -> Trackers:
    """metrics.jsonl and the configured dashboards, on the main process only."""
    if not main:
        return Trackers([])
    dashboards: dict[str, Any] = {"wandb": Wandb}
    return Trackers(
        [MetricsFile(output / "metrics.jsonl", start=start)]
        + [dashboards[name](output, settings, project=config.project) for name in config.trackers]
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a metrics.jsonl; a line torn by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
