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
_PARTED = ":\t"  # name and reason; no name holds it, as tabs are escaped in those


def quarantine(rejected: Sequence[Rejected], folder: Path) -> int:
    """Copies each rejected file below `folder`, under its own id, with all reasons in reasons.txt.

    What is no regular file or cannot be read is named there only. A copy that is there already is
    left as it is; one that an earlier reasons.txt names and that is no longer rejected is removed.
    Returns how many files lie there. Raises UserError where they cannot be written.
    """
    try:
        lines = [f"{shown(_text(bad.id))}{_PARTED}{bad.reason}\n" for bad in rejected]
        _remove(_named(folder) - {shown(_text(bad.id)) for bad in rejected}, folder)
        write_atomically(folder / REASONS, _text("".join(lines)).encode())
        return sum(_copied(bad, folder) for bad in rejected)
    except OSError as error:
        raise UserError(
            f"cannot write to the quarantine {folder}: {error.strerror or error}; make room or "
            "give write permission there, or set data.on_bad_image=report"
        ) from error


def _text(text: str) -> str:
    """As it can be written down."""
    return text.encode("utf-8", "backslashreplace").decode()


def _named(folder: Path) -> set[str]:
    """The names in reasons.txt, as shown there."""
    try:
        lines = (folder / REASONS).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return set()
    return {line.partition(_PARTED)[0] for line in lines if _PARTED in line}


def _remove(names: set[str], folder: Path) -> None:
    """Removes the regular files that are shown so, and the folders that this leaves empty."""
    for parent, _, files in os.walk(folder if names else "", topdown=False):
        place = Path(parent)
        gone = [place / file for file in files if _shown(place / file, folder) in names]
        for path in gone:
            path.unlink()
        while gone and place != folder and not any(place.iterdir()):
            place.rmdir()
            place = place.parent


def _shown(path: Path, folder: Path) -> str:
    """The path as reasons.txt shows it; nothing where it is no regular file."""
    if path.is_symlink() or not path.is_file():
        return ""
    return shown(_text(path.relative_to(folder).as_posix()))


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
