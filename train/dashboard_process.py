"""A dashboard in a process of its own, started by train/dashboards.py, so that nothing it does can
reach a run: a start that never returns, an exit hook that waits for the network, a crash.

    python train/dashboard_process.py NAME

It reads JSON lines: first what to start with, then what is logged, last how the run ended; and
writes JSON lines: what is to be printed, and last that it is done. It knows nothing else of this
project, and is gone a bounded time after the run is.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

Line = dict[str, Any]
Say = Callable[[str, str], None]
"""Has the run print a message of a kind: "note" or "warning"."""

HELD_LINES = 10_000  # that the dashboard has not taken yet
_WATCH_SECONDS = 0.2


class Dashboard(Protocol):
    """What is shown where. Whatever it raises is one warning, and the end of the dashboard only."""

    def __init__(self, output: Path, settings: Line, project: str, say: Say) -> None: ...

    def log(self, line: Line) -> None: ...

    def finish(self, code: int) -> None:
        """code: 0 for a run that has come to its end."""

    def kept(self) -> str:
        """Where what could not be sent is, as the end of a sentence; empty where nowhere."""


class Wandb:
    """A wandb run that is resumed with the run directory.

    The axis of its charts is our `step`, not wandb's own, which refuses to go back: after a resume
    the lines since the checkpoint come twice, one point on the other. Where the server cannot be
    reached it goes on offline.
    """

    INIT_SECONDS = 60

    def __init__(self, output: Path, settings: Line, project: str, say: Say) -> None:
        import wandb

        self._say, self._why = say, ""
        self._run: Any = None
        common: Line = {
            "project": project,
            "name": output.name,
            "id": lasting_id(output / "wandb_id.txt"),
            "resume": "allow",
            "dir": str(output),
            "config": settings,
        }
        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            init_timeout=self.INIT_SECONDS,
            x_stats_pid=os.getppid(),
        )
        try:
            self._run = wandb.init(**common, settings=quiet)
        except Exception as error:
            self._why = brief(error)
            say("warning", f"wandb goes on offline ({self._why})")
            with suppress(Exception, SystemExit):
                wandb.teardown()  # what has tried it holds on to the id
            self._run = wandb.init(**common, settings=quiet, mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._run.url and not self._why:
            say("note", f"wandb: {self._run.url}")

    def log(self, line: Line) -> None:
        self._run.log({name: value for name, value in line.items() if value is not None})

    def finish(self, code: int) -> None:
        self._run.finish(exit_code=code)
        if self._run.offline:
            self._say("note", f"wandb was offline{self.kept()}")

    def kept(self) -> str:
        if self._run is None:
            return ""
        folder = shlex.quote(str(Path(self._run.dir).parent))
        return f"; `wandb sync {folder}` sends what is there"


BOARDS: dict[str, type[Dashboard]] = {"wandb": Wandb}


def lasting_id(path: Path) -> str:
    """The same for every run of a directory."""
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:
        known = uuid.uuid4().hex[:8]
        temporary = path.with_suffix(".writing")
        temporary.write_text(known, encoding="utf-8")
        temporary.replace(path)
    return known


def brief(error: BaseException) -> str:
    """Its first line: some have a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class Server:
    """Passes on lines to a dashboard, and ends this process where that takes too long once the run
    has ended or is gone.

    name, hello: which dashboard, and what to start it with. seconds: how long is too long.
    """

    def __init__(self, name: str, hello: Line, say: Say) -> None:
        self._name, self._hello, self._say = name, hello, say
        self._board: Dashboard | None = None
        self._lines: queue.Queue[Line] = queue.Queue(HELD_LINES)
        self._run, self._ended = os.getppid(), threading.Event()

    def serve(self, source: BinaryIO) -> None:
        """Until a line says how the run ended."""
        for work in (lambda: self._read(source), self._watch):
            threading.Thread(target=work, daemon=True).start()
        try:
            output = Path(self._hello["output"])
            board = BOARDS[self._name]
            self._board = board(output, self._hello["settings"], self._hello["project"], self._say)
            while "end" not in (line := self._lines.get()):
                self._board.log(line)
            self._board.finish(line["end"])
        except (Exception, SystemExit) as error:
            self._warn(f"{self._name} is off for this run ({brief(error)})")

    def _read(self, source: BinaryIO) -> None:
        for text in source:
            with suppress(ValueError):  # torn, where the run was killed
                line = json.loads(text)
                if "end" in line:
                    self._ended.set()
                self._lines.put(line)

    def _watch(self) -> None:
        while os.getppid() == self._run and not self._ended.wait(_WATCH_SECONDS):
            pass
        # Gone without a word. Not the end of its input: a worker of its loader may hold on to that.
        if not self._ended.is_set():
            with suppress(queue.Full):
                self._lines.put_nowait({"end": 1})
        time.sleep(self._hello["seconds"])
        self._warn(
            f"{self._name} has not taken everything within {self._hello['seconds']:.0f} s of the "
            "run's end; metrics.jsonl has it"
        )
        self._say("done", "")
        os._exit(1)

    def _warn(self, text: str) -> None:
        self._say("warning", text + (self._board.kept() if self._board else ""))


def alone() -> tuple[BinaryIO, Say]:
    """Leaves the run's signals and terminal to it. Returns what the run says and what it hears."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    source, messages = os.dup(0), os.dup(1)  # which no child of the dashboard's shall hold
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    def say(kind: str, text: str) -> None:
        with suppress(OSError):
            os.write(messages, json.dumps({"kind": kind, "text": text}).encode() + b"\n")

    return os.fdopen(source, "rb"), say


def main(name: str) -> None:
    source, say = alone()
    hello = source.readline()
    if hello.endswith(b"\n"):
        Server(name, json.loads(hello), say).serve(source)
    say("done", "")
    os._exit(0)  # not by way of exit hooks, which wait for the network


if __name__ == "__main__":
    main(sys.argv[1])
