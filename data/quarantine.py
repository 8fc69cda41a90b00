"""Copies of what cannot be used, to be looked at and mended; the source stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data.files import whole, write_atomically
from data.listing import shown
from data.records import FILE
from train.config import UserError

if TYPE_CHECKING:
    from data.sources import Rejected

REASONS, COPIES = "reasons.txt", ".copies.json"
_PARTED = ":\t"  # name and reason; no name holds it, as tabs are escaped in those


def quarantine(rejected: Sequence[Rejected], folder: Path) -> int:
    """Copies each rejected file below `folder`, under its own id, with all reasons in reasons.txt.

    What is no regular file or cannot be read is named there only. A copy that is there already is
    left as it is; an earlier copy of what is no longer rejected is removed, if nobody changed it.
    Returns how many files lie there. Raises UserError where they cannot be written.
    """
    try:
        lines = [f"{shown(_text(bad.id))}{_PARTED}{bad.reason}\n" for bad in rejected]
        _remove(_known(folder), {bad.id for bad in rejected}, folder)
        write_atomically(folder / REASONS, _text("".join(lines)).encode())
        copies = {bad.id: made for bad in rejected if (made := _copied(bad, folder))}
        write_atomically(folder / COPIES, json.dumps(copies).encode())
        return len(copies)
    except OSError as error:
        raise UserError(
            f"cannot write to the quarantine {folder}: {error.strerror or error}; make room or "
            "give write permission there, or set data.on_bad_image=report"
        ) from error


def _text(text: str) -> str:
    """As it can be written down."""
    return text.encode("utf-8", "backslashreplace").decode()


def _known(folder: Path) -> dict[str, list[int]]:
    """The copies that lie there: size and modification time of each, by id."""
    try:
        copies = json.loads((folder / COPIES).read_bytes())
    except (OSError, ValueError):
        return {}
    return copies if isinstance(copies, dict) else {}


def _remove(copies: Mapping[str, list[int]], rejected: Set[str], folder: Path) -> None:
    """Removes copies of what is rejected no more, unless somebody has changed them, and the
    folders that this leaves empty."""
    for id, made in copies.items():
        path = _below(folder, id)
        if id in rejected or path is None or _facts(path) != made:
            continue
        path.unlink()
        place = path.parent
        while place != folder and not any(place.iterdir()):
            place.rmdir()
            place = place.parent


def _copied(bad: Rejected, folder: Path) -> list[int] | None:
    """Size and modification time of the rejected file's copy, once it lies in the folder."""
    target = _below(folder, bad.id)
    if target is None or not bad.location.startswith(FILE):
        return None
    try:  # neither a link nor a FIFO, whatever has been put there since the scan
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(bad.location.removeprefix(FILE), flags)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as source:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        facts = [status.st_size, status.st_mtime_ns]
        if _facts(target) != facts:
            with whole(target) as copy:
                shutil.copyfileobj(source, copy)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    return facts


def _below(folder: Path, id: str) -> Path | None:
    """The id as a path below the folder; None where it could be none."""
    path = PurePosixPath(id)
    if path.is_absolute() or ".." in path.parts or not path.name or str(path) in (REASONS, COPIES):
        return None
    target = folder / path
    return target if target.resolve().is_relative_to(folder.resolve()) else None


def _facts(path: Path) -> list[int] | None:
    """Size and modification time of a regular file."""
    try:
        there = path.lstat()
    except OSError:
        return None
    return [there.st_size, there.st_mtime_ns] if stat.S_ISREG(there.st_mode) else None
