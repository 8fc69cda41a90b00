"""Folders that a command writes into."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.config import UserError

_OF_WRITING = {
    getattr(errno, name)
    for name in ("EACCES", "EDQUOT", "EEXIST", "EISDIR", "ENOSPC", "ENOTDIR", "EPERM", "EROFS")
}


@contextmanager
def writing_to(folder: Path, key: str = "") -> Iterator[None]:
    """The folder is there; UserError, naming the key it was given by, where nothing can be written
    to it, now or later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno not in _OF_WRITING:
            raise
        named = f"{key}={folder}" if key else str(folder)
        reason = error.strerror or str(error)
        what = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"{named} cannot be used: {reason}{what}; free space or choose another place, and the "
            "same command goes on"
        ) from None
