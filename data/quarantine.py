"""Copies of what cannot be used, to be looked at and mended; the source stays as it is."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data.files import whole, write_atomically
from data.listing import shown
from data.records import FILE
from train.config import UserError

if TYPE_CHECKING:
    from data.sources import Rejected

REASONS = "reasons.txt"


def quarantine(rejected: Sequence[Rejected], folder: Path) -> int:
    """Copies each rejected file below `folder`, under its own id, with all reasons in reasons.txt.

    What is no regular file or cannot be read is named there only. A copy that is there already is
    left as it is. Returns how many files lie there. Raises UserError where they cannot be written.
    """
    try:
        lines = [f"{shown(bad.id)}: {bad.reason}\n" for bad in rejected]
        write_atomically(folder / REASONS, "".join(lines).encode("utf-8", "backslashreplace"))
        return sum(_copied(bad, folder) for bad in rejected)
    except OSError as error:
        raise UserError(
            f"cannot write to the quarantine {folder}: {error.strerror or error}; make room or "
            "give write permission there, or set data.on_bad_image=report"
        ) from error


def _copied(bad: Rejected, folder: Path) -> bool:
    """Whether the rejected file lies in the folder now."""
    target = _below(folder, bad.id)
    if target is None or not bad.location.startswith(FILE):
        return False
    try:  # neither a link nor a FIFO, whatever has been put there since the scan
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(bad.location.removeprefix(FILE), flags)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as source:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return False
        if not _is_copy(target, status):
            with whole(target) as copy:
                shutil.copyfileobj(source, copy)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    return True


def _below(folder: Path, id: str) -> Path | None:
    """The id as a path below the folder; None where it could be none."""
    path = PurePosixPath(id)
    if path.is_absolute() or ".." in path.parts or not path.name or path == PurePosixPath(REASONS):
        return None
    target = folder / path
    return target if target.resolve().is_relative_to(folder.resolve()) else None


def _is_copy(target: Path, status: os.stat_result) -> bool:
    try:
        there = target.lstat()
    except OSError:
        return False
    return (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
