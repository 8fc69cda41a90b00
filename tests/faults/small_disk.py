"""A disk of a few megabytes, as a tmpfs that only its users see, and runs that use it.

    python tests/faults/small_disk.py PID train/lora.py ...    # among the mounts of process PID

A user namespace allows anyone to mount, where the kernel has them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.injected import ROOT, begin

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_REMOUNT, _RECURSIVE, _PRIVATE = 32, 0x4000, 0x40000
_C = ctypes.CDLL(None, use_errno=True)
SCRIPT = "tests/faults/small_disk.py"


class SmallDisk:
    """A disk at `path`, a folder that is there, of so many bytes."""

    def __init__(self, path: Path, size: int) -> None:
        self._holder = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.small_disk", "hold", str(path), str(size)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        said = self._answer()
        if said != "ready":
            self.close()
            pytest.skip(f"the kernel allows no user namespaces: {said}")
        self.seen = Path(f"/proc/{self._holder.pid}/root{path}")
        """Where the disk is from outside."""

    def among(self, entry: str, *arguments: str) -> list[str]:
        """What is to be started for `entry` to have the disk."""
        return [SCRIPT, str(self._holder.pid), entry, *arguments]

    def resize(self, size: int) -> None:
        assert self._holder.stdin
        self._holder.stdin.write(f"{size}\n")
        self._holder.stdin.flush()
        assert self._answer() == "ready"

    def close(self) -> None:
        self._holder.communicate(timeout=30)

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *ended: object) -> None:
        self.close()

    def _answer(self) -> str:
        assert self._holder.stdout
        return self._holder.stdout.readline().strip()


def hold(path: str, size: str) -> None:
    """Mounts the disk, and gives it other sizes as they are asked for on standard input."""
    user, group = os.getuid(), os.getgid()
    _check(_C.unshare(_NEW_USER | _NEW_MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, "/", _RECURSIVE | _PRIVATE, None)
    _mount("tmpfs", path, 0, size)
    print("ready", flush=True)
    for line in sys.stdin:
        _mount("tmpfs", path, _REMOUNT, line.strip())
        print("ready", flush=True)


def _mount(kind: str | None, path: str, flags: int, size: str | None) -> None:
    name = kind.encode() if kind else None
    options = f"size={size}".encode() if size else None
    _check(_C.mount(name, path.encode(), name, ctypes.c_ulong(flags), options))


def join(pid: int) -> None:
    """Makes the mounts of another process this one's."""
    where = Path.cwd()
    for name, kind in (("user", _NEW_USER), ("mnt", _NEW_MOUNTS)):
        with open(f"/proc/{pid}/ns/{name}", encoding="utf-8") as namespace:
            _check(_C.setns(namespace.fileno(), kind))
    os.chdir(where)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        try:
            hold(*sys.argv[2:])
        except OSError as error:
            print(error, flush=True)
    else:
        number, entry, *arguments = sys.argv[1:]
        join(int(number))
        begin(ROOT / entry, arguments, [])
