"""A dashboard in a process of its own, started by train/dashboards.py, so that nothing it does can
reach a run: a start that never returns, an exit hook that waits for the network, a crash.

    python train/dashboard_process.py NAME

It reads JSON lines: first what to start with, then what is logged, last how the run ended; and
writes JSON lines: what is to be printed, and last that it is done. It knows nothing of this project
but the dashboards (train/boards.py), and is gone a bounded time after the run is.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# Run by its path, and perhaps of a tree that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train.boards import Dashboard, Hello, Line, Say, brief  # noqa: E402

HELD_LINES = 10_000  # that the dashboard has not taken yet
_WATCH_SECONDS = 0.2


_EXTRAS = ("previews", "norms", "scores", "artifact")


def board_of(name: str) -> Any:
    """The class of a dashboard, by the name in tracking.trackers."""
    if name == "wandb":
        from train.board_wandb import Wandb

        return Wandb
    if name == "tensorboard":
        from train.board_tensorboard import TensorBoard

        return TensorBoard
    from train.board_trackio import Trackio

    return Trackio


class Server:
    """Passes on lines to a dashboard, and ends this process where that takes too long once the run
    has ended or is gone.

    name, hello: which dashboard, and what to start it with (`Hello`).
    """

    def __init__(self, name: str, hello: Line, say: Say) -> None:
        self._name, self._hello, self._say = name, hello, say
        self._board: Dashboard | None = None
        self._failed: set[str] = set()
        self._lines: queue.Queue[Line] = queue.Queue(HELD_LINES)
        self._end: Line = {"end": 1}
        self._ended = threading.Event()

    def serve(self, source: BinaryIO) -> None:
        """Until a line says how the run ended."""
        for work in (lambda: self._read(source), self._watch):
            threading.Thread(target=work, daemon=True).start()
        try:
            self._board = board_of(self._name)(Hello.of(self._hello), self._say)
            while "end" not in (line := self._lines.get()):
                self._pass_on(self._board, line)
            self._board.finish(line["end"])
        except (Exception, SystemExit) as error:
            self._warn(f"{self._name} is off for this run ({brief(error)})")

    def _pass_on(self, board: Dashboard, line: Line) -> None:
        """A line of metrics, or one of what is shown beside them and may fail by itself."""
        shows = line.pop("shows", None)
        if shows is None:
            board.log(line)
        elif shows in _EXTRAS and shows not in self._failed:
            try:
                getattr(board, shows)(**line)
            except Exception as error:
                self._failed.add(shows)
                self._say("warning", f"{self._name} goes on without {shows} ({brief(error)})")

    def _read(self, source: BinaryIO) -> None:
        for text in source:
            with suppress(ValueError):  # torn, where the run was killed
                line = json.loads(text)
                if "end" in line:
                    self._end = line
                    self._ended.set()
                self._lines.put(line)

    def _watch(self) -> None:
        # By the number that the run has said: it may have gone before this process looks.
        while os.getppid() == self._hello["pid"] and not self._ended.wait(_WATCH_SECONDS):
            pass
        # Gone without a word. Not the end of its input: a worker of its loader may hold on to that.
        if not self._ended.is_set():
            with suppress(queue.Full):
                self._lines.put_nowait(self._end)
        self._warn(
            f"{self._name} has not taken everything within {self._wait():.0f} s of the run's end; "
            "metrics.jsonl has every line"
        )
        with suppress(Exception):
            if self._board is not None:
                self._board.cut_off(self._end["end"])
        self._say("done", "")
        os._exit(1)

    def _wait(self) -> float:
        """As long as this process may take; returns the seconds."""
        seconds, files = self._hello["seconds"], self._end.get("files", 0.0)
        time.sleep(seconds)
        if self._board is None:  # not even begun: it would send no file either
            return float(seconds)
        time.sleep(files)
        return float(seconds + files)

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
