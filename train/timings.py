"""What a run's time goes into beside its optimizer steps, added up in OUTPUT/timings.json over all
the processes that have gone on with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.files import write_atomically
from train import screens

NAME = "timings.json"


class Timings:
    """Seconds by what they were spent on, of the main process; on others nothing.

    start: the step from which the run goes on; at 0 earlier ones are forgotten. What a killed
    process has not written yet is lost, and nothing depends on it.
    """

    def __init__(self, output: Path, *, start: int, main: bool) -> None:
        self._path, self._main = output / NAME, main
        self._seconds = read(output) if start else {}
        self.add("startup", screens.since_start())

    def add(self, what: str, seconds: float) -> None:
        self._seconds[what] = self._seconds.get(what, 0.0) + seconds

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - before)

    def write(self) -> None:
        """Whole or not at all; a full disk is no reason to end a run."""
        if self._main:
            text = json.dumps({what: round(spent, 2) for what, spent in self._seconds.items()})
            with suppress(OSError):
                write_atomically(self._path, f"{text}\n".encode())


def read(output: Path) -> dict[str, float]:
    """What the runs of a directory have written; nothing where there is nothing to be read."""
    try:
        found = json.loads((output / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {what: float(spent) for what, spent in found.items() if isinstance(spent, int | float)}
