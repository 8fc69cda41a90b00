"""What is asked of every example: it ends in time, and in nothing but success or UserError."""

from __future__ import annotations

import faulthandler
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from train.config import RunFailed, UserError

SECONDS = 20  # of the processor for one example; most take some hundredths
WAITING = 300  # by the clock, on a machine that others use too
MEMORY = 4 << 30  # bytes of addresses, more than what is taken when a long run begins

R = TypeVar("R")


class Hung(BaseException):
    """Not an Exception, so that nobody takes it for a damaged file."""


def outcome(work: Callable[[], R]) -> R | None:
    """What the work returns; None where it raised UserError with a message that can be printed."""
    alarms = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, _late) for number in alarms}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        return work()
    except (UserError, RunFailed) as error:
        message = str(error)
        assert message.strip(), "says nothing"
        assert len(message) < 20_000, f"says {len(message)} characters"
        message.encode()  # or printing it would be the next error
        return None
    finally:
        for number, timer in alarms.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _late(*_: Any) -> None:
    raise Hung(f"not done after {SECONDS} s of work, or {WAITING} s of waiting")


def limit() -> None:
    """For a long run in a process of its own: memory ends in MemoryError, and a hang inside of C,
    where no signal is heard, in a traceback."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


class Watchdog:
    """Ends the process with a traceback where an example holds the interpreter itself."""

    def __enter__(self) -> Watchdog:
        self.began = time.process_time()
        faulthandler.dump_traceback_later(WAITING + 10, exit=True, file=sys.__stderr__)
        return self

    def __exit__(self, *_: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
