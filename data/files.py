"""Files written whole or not at all, and the progress of what takes long."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from train import screens

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """The progress that nobody watches."""


def progress(what: str, shown: bool = True) -> Progress:
    """A bar on stderr, where the work takes long enough."""
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            # A delay keeps the bar out of what is done at once, an error message above all.
            bar = screens.bar(total, what, shown=shown, delay=1.0)
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that stands at `path` once all of it is on the disk, and never in part, also
    through a crash: temporary file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the name itself, which may be as long as names can be.
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    temporary = path.with_name(f".{digest}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def forget_unfinished(folder: Path) -> None:
    """Removes what a killed `whole` left below the folder, where nobody is writing now."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    with whole(path) as file:
        file.write(content)


def move_together(moves: Iterable[tuple[Path, Path]]) -> None:
    """Moves each to its goal, one after the other, or none: what has been moved goes back where one
    fails."""
    moved: list[tuple[Path, Path]] = []
    try:
        for source, goal in moves:
            os.replace(source, goal)
            moved.append((source, goal))
    except BaseException:
        for source, goal in reversed(moved):
            os.replace(goal, source)
        raise


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system knows how, and the file itself is safe
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
