"""Dashboards that cannot hurt a run: each is a process of its own (train/dashboard_process.py), to
which lines are handed over without waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from train import screens, stopping

FINISH_SECONDS = 30.0
"""How long the end of a run waits for dashboards at the most, but for files that they send; one
whose run has gone takes no longer either."""
SEND_RATE = 1e6
"""Bytes a second that files are given time for."""
SEND_SECONDS = 570.0
"""Of that time, the most."""
LEAVE_SECONDS = 5.0
"""How long one waits that failed, or was asked to end."""
TELL_SECONDS = 3.0
"""How long one waits without a word."""
HELD_LINES = 10_000
"""Lines that wait for a dashboard at the most."""
_SENDS_FILES = ("wandb", "trackio")
_PROCESS = Path(__file__).with_name("dashboard_process.py")
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0
"""By which the process itself is quicker, and can say what is missing."""


class Dashboard:
    """One dashboard. Nothing here raises, and nothing waits but `finish`, a bounded time.

    name: as in tracking.trackers.
    """

    def __init__(self, name: str, hello: Mapping[str, Any]) -> None:
        """hello: what it is told of the run, as train/boards.py's `Hello`, but for `pid` and
        `seconds`."""
        self.name = name
        self._waiting: deque[bytes] = deque()
        self._heard = b""
        self._left_out, self._done = 0, False
        self._to_send = 0  # bytes of files
        self._process = self._start()
        self._hand_over({**hello, "pid": os.getpid(), "seconds": FINISH_SECONDS})

    def _start(self) -> subprocess.Popen[bytes] | None:
        # -P: the folder of the script is no place to import from.
        command = [sys.executable, "-P", str(_PROCESS), self.name]
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
            warn(f"{self.name} is off for this run ({error})")
            return None
        assert process.stdin and process.stdout
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    @property
    def is_sending(self) -> bool:
        """Whether something may still be on its way."""
        return self._process is not None and self._process.poll() is None and not self._done

    @property
    def seconds_for_files(self) -> float:
        """How much longer it may take at the run's end for what it was given to keep."""
        return min(self._to_send / SEND_RATE, SEND_SECONDS)

    def log(self, metrics: dict[str, Any]) -> None:
        if self._process is None:
            return
        if len(self._waiting) < HELD_LINES:
            self._hand_over(metrics)
        else:
            self._left_out += 1
        self._listen()
        if self._process.poll() is not None:
            self.conclude()

    def show(self, what: str, **content: Any) -> None:
        """What stands beside the metrics; what, content: a method of train/boards.py's `Dashboard`
        and its arguments, small and of JSON: pictures and files by their paths."""
        if what == "artifact" and self.name in _SENDS_FILES:
            self._to_send += sum(map(_bytes_of, map(Path, content["paths"])))
        self.log({"shows": what, **content})

    def finish(self, *, failed: bool = False) -> None:
        finish([self], failed=failed)

    def end(self, *, failed: bool) -> None:
        """Hands over how the run ended, without waiting."""
        self._hand_over({"end": int(failed), "files": self.seconds_for_files})

    def attend(self, waited: float) -> None:
        """waited: seconds since the end; one that is late is killed."""
        if self._process is None:
            return
        if waited > FINISH_SECONDS + self.seconds_for_files + _GRACE_SECONDS:
            self._process.kill()
            self._process.wait()
        self._write()
        self._listen()

    def conclude(self) -> None:
        """Says what is missing. From here on the process is on its own."""
        if self._process is None:
            return
        self._listen()
        if self._left_out:
            warn(f"{self.name} was left out of {self._left_out} lines; metrics.jsonl has them")
        if not self._done and (code := self._process.poll()) is not None:
            warn(f"the process of {self.name} ended with code {code}; metrics.jsonl has every line")
        self._process = None

    def _hand_over(self, line: dict[str, Any]) -> None:
        if self._process is None:
            return
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
                note(message["text"])


def finish(dashboards: Sequence[Dashboard], *, failed: bool = False) -> None:
    """Waits until they have sent everything, all at once and for so long as is said above.

    A run that failed or was asked to end leaves them to go on by themselves soon; one that is asked
    to while it waits here does so at once.
    """
    for board in dashboards:
        board.end(failed=failed)
    with suppress(KeyboardInterrupt):  # where nobody else listens
        _wait_for(dashboards, failed=failed)
    for board in dashboards:
        board.conclude()


def _wait_for(dashboards: Sequence[Dashboard], *, failed: bool) -> None:
    since, asked_before, told = time.monotonic(), stopping.asked(), False
    while sending := [board for board in dashboards if board.is_sending]:
        waited = time.monotonic() - since
        if asked_before or failed:
            if waited > LEAVE_SECONDS:
                return
        elif stopping.asked():
            note(f"{_named(sending)}: sending goes on without the run")
            return
        elif waited > TELL_SECONDS and not told:
            told, longest = True, FINISH_SECONDS + max(b.seconds_for_files for b in sending)
            note(
                f"waiting until {_named(sending)} has everything, {longest:.0f} s at the most "
                "(Ctrl-C: no longer)"
            )
        time.sleep(_POLL_SECONDS)
        for board in sending:
            board.attend(waited)


def _named(dashboards: Sequence[Dashboard]) -> str:
    return " and ".join(board.name for board in dashboards)


def _bytes_of(path: Path) -> int:
    """Of a file, or all files of a folder; 0 for what cannot be read."""
    try:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0


def warn(text: str) -> None:
    with screens.unheard():
        print(f"warning: {text}", file=sys.stderr)


def note(text: str) -> None:
    with screens.unheard():
        screens.say(text)
