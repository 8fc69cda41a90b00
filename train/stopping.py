"""Signals that ask a run to end: it saves a checkpoint first, and its exit code says why it ended.

A handler only takes note. What takes long asks `check` where it can stop with nothing lost; the
training loop asks between two steps, all processes together (`Agreement`), and saves. Where one
process was asked to end, all end, with the same exit code: before training by `jointly`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from train.config import RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

# How long processes wait for one another. Shares of what is cached differ, above all of a streamed
# set with few shards; the launcher ends all processes where one died.
PATIENCE = timedelta(days=1)

# SIGUSR1 is what SLURM is told to send before a job's time is up, SIGHUP a closed terminal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher passes on the Ctrl-C that the terminal has sent to all: that is no second one.
_SECOND_SECONDS = 2.0
_LOOK_SECONDS = 1.0  # between two looks at what other processes say
_WAIT_SECONDS = 0.01  # between two looks at whether they have arrived
_JOIN_SECONDS = 1800.0  # how long one that is there waits for the others to start
_LEAVE_SECONDS = 60.0  # how long the first process may take to say that it ended
_PR_SET_PDEATHSIG = 1
_PARENT = os.getppid()  # early enough to be the launcher, if there is one
_ASKED, _SAID = "sd-atelier/asked", "sd-atelier/said"
# What gloo, NCCL and the store of torch.distributed say of a process that is no more.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "failed to recv, got 0 bytes",
)

FILE = "interrupted.json"

_asked: int | None = None
"""The first signal."""
_came: dict[int, float] = {}
"""When each came first."""
_looked = 0.0
"""When this process last looked whether another was asked."""


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

    Where the run in the folder `output` ends for one, OUTPUT/interrupted.json says so, for
    launchers end with a code of their own, and nothing more is heard of signals: this process is
    about to end with its own code. Raises RunFailed where another process of the run has gone.
    """
    global _asked
    _asked = None
    _came.clear()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    after: Any = before
    for number in heard:
        signal.signal(number, _note)
    _follow_the_launcher()
    try:
        yield
    except Interrupted as interrupted:
        _say_why(output, interrupted)
        # A launcher that saw another process end asks this one once more, on its way out.
        after = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    except RunFailed:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunFailed(
            f"{error}: free space there, or raise the limit of file sizes (ulimit -f), then give "
            "the same command again"
        ) from None
    except RuntimeError as error:
        gone = next((text for text in _GONE if text.lower() in str(error).lower()), None)
        if gone is None:
            raise
        raise RunFailed(
            f"another process of this run has gone ({gone}). What it said, if anything, is beside "
            "this; the same command goes on from the last checkpoint"
        ) from None
    finally:
        for number in heard:
            signal.signal(number, after[number])
        _asked = None


def _say_why(output: Path, interrupted: Interrupted) -> None:
    """The first process does, and the others stay until it has: a launcher that sees one of them
    end may kill the rest."""
    if os.environ.get("RANK", "0") == "0":
        _tell(output, interrupted)
        _post(_SAID, 1)
    elif (store := _store()) is not None:
        with suppress(RuntimeError):  # it ended without a word, or too late
            store.wait([_SAID], timedelta(seconds=_LEAVE_SECONDS))


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
    try:
        print(f"{interrupted}: {kept}; the same command goes on from there", flush=True)
    except OSError:  # the terminal is closed, or who read this was asked to end too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _note(number: int, _frame: Any) -> None:
    global _asked
    now = time.monotonic()
    first = _came.setdefault(number, now)
    if _asked is None:
        _asked = number
        again = "; once more ends it without" if number == signal.SIGINT else ""
        _say(f"\n{signal.Signals(number).name}: saving a checkpoint and ending{again}\n")
    elif number == signal.SIGINT and now - first > _SECOND_SECONDS:
        _say("\nSIGINT again: ending without saving\n")
        os._exit(128 + number)


def _say(text: str) -> None:
    # Not print: the signal may have come in the middle of one.
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, text.encode())


def asked() -> int:
    """The number of the signal that asked this process to end; 0 where none did."""
    return _asked or 0


def check() -> None:
    """Raises Interrupted where this process was asked to end, or another one of those that work
    `jointly`. For what needs no other process."""
    if number := asked() or _asked_elsewhere():
        raise Interrupted(number)


def _asked_elsewhere() -> int:
    """The number of the signal that another process has told of; 0 for none."""
    global _looked
    now = time.monotonic()
    if now - _looked < _LOOK_SECONDS:
        return 0
    _looked = now
    store = _store()
    return int(store.get(_ASKED)) if store is not None and store.check([_ASKED]) else 0


def tell_others(number: int) -> None:
    """That this process was asked to end: they find it when they `check`."""
    _post(_ASKED, number)


def _post(key: str, number: int) -> None:
    """For the other processes to read, if there are any."""
    if (store := _store()) is not None:
        with suppress(RuntimeError):  # whoever kept it has gone
            store.set(key, str(number))


def _store() -> Any:
    """What all processes of a run can write to and read at any time; None where there is one."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()


def checking(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """A progress that raises Interrupted as `check` does."""

    def show(done: int, total: int) -> None:
        check()
        progress(done, total)

    return show


def jointly(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives in this process, once every one has done its own. A place where all of them
    meet.

    Where one is asked to end meanwhile, at work or waiting, all raise Interrupted: those at work
    from their next `check`. Any other error is raised at once, and ends the run for the others too.
    """
    agreement, number = Agreement(accelerator), 0
    try:
        result = work()
    except Interrupted as interrupted:
        number = interrupted.number
        _post(_ASKED, number)
    agreement.wait()
    if number := agreement.most(number or asked())[0]:
        raise Interrupted(number)
    return result


@contextmanager
def forking() -> Iterator[None]:
    """A process that is forked within it hears no signals before it says that it will `ignore`
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore(parent: int) -> None:
    """For a process that works for another one, `parent`, which alone decides when both end: the
    loader's. Signals are often sent to all processes of a job, and without its loader a run cannot
    go on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _die_with(parent, signal.SIGKILL)


def _follow_the_launcher() -> None:
    """Has a launcher that dies, as Accelerate's does of SIGTERM, leave no orphan behind."""
    launched = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched:
        _die_with(_PARENT, signal.SIGTERM)


def _die_with(parent: int, number: int) -> None:
    """Has the kernel send a signal to this process once its parent is no more."""
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), number)


class Agreement:
    """What the processes of a run decide together, once a step. On the host, so that nothing waits
    for a device, and that one of them has gone is noticed at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._group = _hosts() if accelerator.num_processes > 1 else None

    def wait(self) -> None:
        """Until all processes are here. Whoever is asked to end meanwhile tells those that are not
        yet, who find it when they `check`."""
        if self._group is None:
            return
        arrived = self._reduced(_numbers([0]))
        told = False
        while not arrived.is_completed():
            if asked() and not told:
                _post(_ASKED, asked())
                told = True
            time.sleep(_WAIT_SECONDS)
        arrived.wait()

    def most(self, *mine: int) -> list[int]:
        """The largest of each number over all processes. They meet here."""
        if self._group is None:
            return list(mine)
        numbers = _numbers(mine)
        self._reduced(numbers).wait()
        return numbers.tolist()

    def check(self) -> None:
        """Raises Interrupted in all processes where any was asked to end. They meet here."""
        if number := self.most(asked())[0]:
            raise Interrupted(number)

    def _reduced(self, numbers: Any) -> Any:
        from torch.distributed import ReduceOp, all_reduce

        return all_reduce(numbers, ReduceOp.MAX, group=self._group, async_op=True)


def _numbers(values: Sequence[int]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int64)


@cache
def _hosts() -> Any:
    """The group of all processes that meets on their hosts; where that is not the one there is,
    made once: while it is made, it is not noticed who has gone."""
    from torch import distributed

    if distributed.get_backend() == "gloo":
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def joining() -> Iterator[None]:
    """Ends this process, with code 1, where the others do not join it: before they have, nothing
    tells that one of them has gone."""
    text = f"error: the other processes of this run have not come in {_JOIN_SECONDS:g} s\n"
    timer = threading.Timer(_JOIN_SECONDS, lambda: (os.write(2, text.encode()), os._exit(1)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
