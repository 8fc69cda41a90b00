"""Signals that ask a run to end: it saves a checkpoint first, and its exit code says why it ended.

A handler only takes note. What takes long asks `check` where it can stop with nothing lost; the
training loop asks between two steps, all processes together (`Agreement`), and saves.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator

# How long processes wait for one another. Shares of what is cached differ, above all of a streamed
# set with few shards; the launcher ends all processes where one died.
PATIENCE = timedelta(days=1)

# SIGUSR1 is what SLURM is told to send before a job's time is up, SIGHUP a closed terminal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher passes on the Ctrl-C that the terminal has sent to all: that is no second one.
_SECOND_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1

FILE = "interrupted.json"

_asked: tuple[int, float] | None = None
"""The first signal and when it came."""


class Interrupted(SystemExit):
    """A run that ends because it was asked to; its exit code is 128 + the signal's number, as a
    shell gives for one that is killed by it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.step: int | None = None
        """That of the checkpoint which was saved for it, if the run had come so far."""

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name

    def __str__(self) -> str:
        return self.name


@contextmanager
def listening(output: Path) -> Iterator[None]:
    """Within it the signals are taken note of, but for those that whoever started this process has
    it ignore (nohup). A second Ctrl-C ends it at once, without saving.

    Where the run in the folder `output` ends for one, OUTPUT/interrupted.json says so: launchers
    end with a code of their own.
    """
    global _asked
    _asked = None
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, _note)
    _follow_the_launcher()
    try:
        yield
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            _tell(output, interrupted)
        raise
    finally:
        for number in heard:
            signal.signal(number, before[number])
        _asked = None


def _tell(output: Path, interrupted: Interrupted) -> None:
    content = {
        "signal": interrupted.name,
        "exit_code": interrupted.code,
        "step": interrupted.step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with suppress(OSError):
        temporary = output / f".writing-{FILE}"
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        temporary.replace(output / FILE)
    kept = "nothing was trained since it began"
    if interrupted.step:
        kept = f"the checkpoint of step {interrupted.step} is saved"
    print(f"{interrupted}: {kept}; the same command goes on from there", flush=True)


def _note(number: int, _frame: Any) -> None:
    global _asked
    now = time.monotonic()
    if _asked is None:
        _asked = number, now
        again = "; once more ends it without" if number == signal.SIGINT else ""
        _say(f"\n{signal.Signals(number).name}: saving a checkpoint and ending{again}\n")
    elif number == signal.SIGINT and now - _asked[1] > _SECOND_SECONDS:
        _say("\nSIGINT again: ending without saving\n")
        os._exit(128 + number)


def _say(text: str) -> None:
    # Not print: the signal may have come in the middle of one.
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, text.encode())


def asked() -> int:
    """The number of the signal that asked this process to end; 0 where none did."""
    return _asked[0] if _asked else 0


def check() -> None:
    """Raises Interrupted where this process was asked to end. For what needs no other process."""
    if number := asked():
        raise Interrupted(number)


def checking(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A progress that raises Interrupted where this process was asked to end."""

    def show(done: int, total: int) -> None:
        check()
        progress(done, total)

    return show


def ignore() -> None:
    """For a process that works for another one, which alone decides when both end: the loader's.
    Signals are often sent to all processes of a job, and without its loader a run cannot go on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent(signal.SIGKILL)


def _follow_the_launcher() -> None:
    """Has a launcher that dies, as Accelerate's does of SIGTERM, leave no orphan behind."""
    launched = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched:
        _die_with_parent(signal.SIGTERM)


def _die_with_parent(number: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), number)


class Agreement:
    """What the processes of a run decide together, once a step. On the host, so that nothing waits
    for a device."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = None
        if accelerator.num_processes > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def most(self, *mine: int) -> list[int]:
        """The largest of each number over all processes. They meet here."""
        if self._group is None:
            return list(mine)
        import torch
        import torch.distributed

        numbers = torch.tensor(mine, dtype=torch.int64)
        try:
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            raise RunFailed(
                f"another process of this run has gone ({error}). What it said is above; the same "
                "command goes on from the last checkpoint"
            ) from None
        return numbers.tolist()

    def close(self) -> None:
        if self._group is not None:
            import torch.distributed

            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def check(self) -> None:
        """Raises Interrupted in all processes where any was asked to end. They meet here."""
        if number := self.most(asked())[0]:
            raise Interrupted(number)
