"""Dashboards that cannot hurt a run: each is a process of its own (train/dashboard_process.py), to
which lines are handed over without waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from train import stopping

FINISH_SECONDS = 30.0
"""How long the end of a run waits for a dashboard at the most; a dashboard whose run has gone takes
no longer either."""
LEAVE_SECONDS = 5.0
"""How long one waits that failed, or was asked to end."""
HELD_LINES = 10_000
"""Lines that wait for a dashboard at the most."""
_PROCESS = Path(__file__).with_name("dashboard_process.py")
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0
"""By which the process itself is quicker, and can say what is missing."""


class Dashboard:
    """One dashboard. Nothing here raises, and nothing waits but `finish`, a bounded time."""

    def __init__(self, name: str, hello: Mapping[str, Any]) -> None:
        """hello: what it is told of the run, as train/boards.py's `Hello`, but for `seconds`."""
        self._name = name
        self._waiting: deque[bytes] = deque()
        self._heard = b""
        self._left_out, self._done = 0, False
        self._process = self._start()
        self._hand_over({**hello, "seconds": FINISH_SECONDS})

    def _start(self) -> subprocess.Popen[bytes] | None:
        # -P: the folder of the script is no place to import from.
        command = [sys.executable, "-P", str(_PROCESS), self._name]
        # A service of the wandb that this process may have been started from is not ours.
        environment = {key: v for key, v in os.environ.items() if key != "WANDB_SERVICE"}
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C and a launcher's kill are not for it
                bufsize=0,
            )
        except OSError as error:
            warn(f"{self._name} is off for this run ({error})")
            return None
        assert process.stdin and process.stdout
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def log(self, metrics: dict[str, Any]) -> None:
        if len(self._waiting) < HELD_LINES:
            self._hand_over(metrics)
        else:
            self._left_out += 1
        self._listen()

    def show(self, what: str, **content: Any) -> None:
        """What stands beside the metrics; what, content: a method of train/boards.py's `Dashboard`
        and its arguments, small and of JSON: pictures and files by their paths."""
        self.log({"shows": what, **content})

    def finish(self, *, failed: bool = False) -> None:
        """Waits until everything is sent, for so long as is said above. A run that failed or was
        asked to end leaves it to go on by itself."""
        if self._process is None:
            return
        self._hand_over({"end": int(failed)})
        since = time.monotonic()
        while self._process.poll() is None and not self._done:
            waited = time.monotonic() - since
            if waited > LEAVE_SECONDS and (failed or stopping.asked()):
                break
            if waited > FINISH_SECONDS + _GRACE_SECONDS:
                self._process.kill()
                self._process.wait()
            time.sleep(_POLL_SECONDS)
            self._write()
            self._listen()
        self._listen()
        self._conclude()

    def _conclude(self) -> None:
        assert self._process is not None
        if self._left_out:
            warn(f"{self._name} was left out of {self._left_out} lines; metrics.jsonl has them")
        if not self._done and (code := self._process.poll()) is not None:
            warn(
                f"the process of {self._name} ended with code {code}; metrics.jsonl has every line"
            )
        self._process = None

    def _hand_over(self, line: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(line).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        """As much of what waits as the pipe takes."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            while self._waiting:
                taken = os.write(self._process.stdin.fileno(), self._waiting[0])
                self._waiting[0] = self._waiting[0][taken:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:  # it has ended, and said why
            self._waiting.clear()

    def _listen(self) -> None:
        """Prints what the process has said since."""
        if self._process is None or self._process.stdout is None:
            return
        with suppress(OSError):
            while more := os.read(self._process.stdout.fileno(), 65536):
                self._heard += more
        *whole, self._heard = self._heard.split(b"\n")
        for text in whole:
            message = json.loads(text)
            if message["kind"] == "done":
                self._done = True
            elif message["kind"] == "warning":
                warn(message["text"])
            else:
                say(message["text"])


def warn(text: str) -> None:
    say(f"warning: {text}")


def say(text: str) -> None:
    with suppress(OSError):  # the terminal has been closed
        print(text, file=sys.stderr)
