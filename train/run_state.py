"""Whether a run is running, finished, or ended before its time, as its folder and its lock say.

Not for the process of the run itself: to look at the lock it opens OUTPUT/.lock, and by closing it
again that process would give its own lock away (train/run_lock.py).
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Literal, NamedTuple

from train import run_lock, rundir, stopping
from train.run_record import read_json

Name = Literal["finished", "running", "interrupted", "failed", "stopped", "not begun"]

_FLOCK = "hhqqi4x"  # struct flock of Linux, 64 bits: type, whence, start, length, process


class State(NamedTuple):
    """What became of a run."""

    name: Name
    """failed: with an error of its own; stopped: without a word, killed as a rule."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.detail}".rstrip()


def state_of(folder: Path, *, done: int, planned: int | None) -> State:
    """done: optimizer steps that are logged, of so many planned."""
    if is_running(folder):
        return State("running", _far(done, planned))
    if planned is not None and done >= planned and _has_result(folder):
        return State("finished")
    asked = read_json(folder / stopping.FILE)
    if asked:
        step = asked.get("step")
        at = f"at step {step:,}" if isinstance(step, int) else _far(done, planned)
        return State("interrupted", f"{at} by {asked['signal']}" if "signal" in asked else at)
    if error := read_json(folder / rundir.FAILED).get("error"):
        return State("failed", f"{_far(done, planned)}: {error}")
    return State("stopped", _far(done, planned)) if done else State("not begun")


def is_running(folder: Path) -> bool:
    """Whether a process has the run directory."""
    try:
        descriptor = os.open(folder / run_lock.NAME, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return bool(answer[0] != fcntl.F_UNLCK)
    except (OSError, struct.error):  # a file system without locks: what the file says
        holder = run_lock.holder_of(descriptor)
        return holder is not None and (not holder.is_here or holder.is_alive)
    finally:
        os.close(descriptor)


def _far(done: int, planned: int | None) -> str:
    return f"at step {done:,} of {planned:,}" if planned is not None else f"at step {done:,}"


def _has_result(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("adapter", "full"))
