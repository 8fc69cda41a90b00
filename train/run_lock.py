"""One run at a time in a run directory.

The first process of a run holds a POSIX record lock on OUTPUT/.lock. The kernel takes it back
however that process ends, and processes forked from it do not have it. What the file says is for
the message; it decides only where the file system has no locks. Over NFS the lock holds between
machines, but for mounts with `nolock` (Lustre: `localflock`), whose locks are each machine's own.

A process loses its record lock when it closes the file through any descriptor: nothing else in it
may open OUTPUT/.lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from train.config import UserError

NAME = ".lock"
_HELD = (errno.EAGAIN, errno.EACCES)
_MOST = 4096  # bytes of the file that are read
_TRIES = 1000


class Holder(NamedTuple):
    """Whose lock it is, as the file says."""

    host: str
    pid: int
    started: str
    """Local time with its offset, to the second."""
    ticks: int | None
    """When the process began, as the kernel counts it; None where it does not say."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, begun {self.started}"

    @property
    def is_here(self) -> bool:
        return self.host == platform.node()

    @property
    def is_alive(self) -> bool:
        """Of this machine's: whether it still runs, and its number is not another's by now."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            pass  # another user's
        return self.ticks is None or _ticks(self.pid) in (None, self.ticks)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it the run directory is this process's. It is made if need be, and removed again if
    nothing was written there.

    Raises UserError naming who has it, or where it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    try:
        try:
            descriptor = _taken(path)
        except OSError as error:
            raise UserError(
                f"output={folder} cannot be written: {path}: {error.strerror or error}. Choose "
                "another output="
            ) from None
        try:
            yield
        finally:
            # Whoever waits for it with the file open finds it gone, and takes a new one.
            if _is_at(descriptor, path):
                path.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with suppress(OSError):
            for place in made:
                place.rmdir()


def _taken(path: Path) -> int:
    """The locked file's descriptor."""
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the run that had made the folder has just removed it
            continue
        try:
            before = _claimed(descriptor, path)
            if _is_at(descriptor, path):
                _sign(descriptor)
                if before is not None:
                    print(
                        f"note     took over {path}, left by {before}, which has ended", flush=True
                    )
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last owner removed it between our opening and our locking it
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _claimed(descriptor: int, path: Path) -> Holder | None:
    """Locks the file; returns who has left it, if anybody. Raises UserError where it is held."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = holder_of(descriptor)
        if error.errno in _HELD:
            raise UserError(
                f"output={path.parent} is in use by another run ({holder or 'still starting'}). "
                "Wait for its end, or choose another output="
            ) from None
        _judge(holder, descriptor, path)
    return holder_of(descriptor)


def _judge(holder: Holder | None, descriptor: int, path: Path) -> None:
    """Where the file system has no locks, by what the file says. Raises UserError where its run is
    alive or may be."""
    if holder is None and not os.fstat(descriptor).st_size:
        return
    if holder is not None and holder.is_here and not holder.is_alive:
        return
    if holder is not None and holder.is_here:
        raise UserError(
            f"output={path.parent} is in use by another run ({holder}). Wait for its end, or "
            "choose another output="
        )
    raise UserError(
        f"output={path.parent} may be in use by another run ({holder or 'unknown'}): this file "
        f"system has no locks to tell. If that run is over, remove {path}; or choose another "
        "output="
    )


def _sign(descriptor: int) -> None:
    pid = os.getpid()
    started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    mine = Holder(platform.node(), pid, started, _ticks(pid))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(mine._asdict()) + "\n").encode(), 0)


def holder_of(descriptor: int) -> Holder | None:
    """What the file says; None for what says nothing."""
    try:
        said = json.loads(os.pread(descriptor, _MOST, 0))
        ticks = said["ticks"]
        return Holder(
            str(said["host"]),
            int(said["pid"]),
            str(said["started"]),
            None if ticks is None else int(ticks),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine started (proc(5), stat, field 22)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
