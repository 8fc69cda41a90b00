"""What every dashboard is, and what it is started with; for train/dashboard_process.py.

Nothing here is heavy, and each dashboard imports its package only when it starts.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Line = dict[str, Any]
Say = Callable[[str, str], None]
"""Has the run print a message of a kind: "note" or "warning"."""


@dataclass(frozen=True)
class Hello:
    """What a dashboard is told of its run first."""

    output: Path
    settings: Line
    """The run's whole configuration."""
    project: str
    name: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    job: str | None = None
    """What is trained; None where the settings do not say."""
    offline: bool = False
    start: int | None = None
    """The step that training goes on from, after which nothing holds; None where it is over."""
    seconds: float = 30.0
    """How long the dashboard may take once the run has ended, but for files."""
    pid: int = 0
    """Of the run's process."""

    @property
    def steps(self) -> int:
        """Of the whole run; 0 where its settings do not say."""
        return int((self.settings.get("train") or {}).get("steps", 0))

    @classmethod
    def of(cls, line: Line) -> Hello:
        """From a line of JSON."""
        return cls(**{**line, "output": Path(line["output"]), "tags": tuple(line["tags"])})


@dataclass(frozen=True)
class Preview:
    """A picture of the model in training, and the base's of the same prompt and seed."""

    prompt: str
    seed: int
    picture: Path
    base: Path | None

    @classmethod
    def of(cls, line: Line) -> Preview:
        base = Path(line["base"]) if line["base"] else None
        return cls(line["prompt"], line["seed"], Path(line["picture"]), base)

    def named(self, number: int) -> str:
        """A title for the pictures of this prompt, the `number`th."""
        return f"previews/{number:02d} {self.prompt[:60]}"


class Dashboard(Protocol):
    """What is shown where. Whatever its start, `log` or `finish` raise is one warning and the end
    of the dashboard only; of the rest, one warning and that it is left out."""

    def __init__(self, hello: Hello, say: Say) -> None: ...

    def log(self, line: Line) -> None:
        """A line of metrics.jsonl."""

    def previews(self, step: int, pictures: list[Line]) -> None:
        """pictures: each as a `Preview`."""

    def norms(self, step: int, blocks: dict[str, list[float]]) -> None:
        """blocks: as train/norms.py has them."""

    def scores(self, rows: list[Line]) -> None:
        """Of an evaluation; rows: as train/tracking.py's `score_rows`."""

    def artifact(self, name: str, kind: str, paths: list[str]) -> None:
        """Files and folders to be kept with the run. kind: "dataset", "model" or "report"."""

    def finish(self, code: int) -> None:
        """code: 0 for a run that has come to its end."""

    def cut_off(self, code: int) -> None:
        """What is left to be done as the process is ended before `finish` was through; at once."""

    def kept(self) -> str:
        """Where what could not be sent is, as the end of a sentence; empty where nowhere."""


def lasting_id(path: Path, given: str | None = None) -> str:
    """The same for every run of a directory: what the file says, else `given`, else a new one."""
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = given or uuid.uuid4().hex[:8]
        temporary = path.with_suffix(".writing")
        temporary.write_text(known, encoding="utf-8")
        temporary.replace(path)
    return known


def brief(error: BaseException) -> str:
    """Its first line: some have a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def total(norms: list[float]) -> float:
    """The norm of several layers together."""
    return sum(norm * norm for norm in norms) ** 0.5


SCORE_COLUMNS = (
    *("metric", "better", "base", "value", "low", "high"),
    *("change", "change_low", "change_high", "verdict"),
)
"""Of the table of an evaluation; low and high are the ends of 95 % intervals."""
