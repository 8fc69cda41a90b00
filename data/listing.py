"""What lies in a folder: its visible regular files by name, and everything that is wrong there."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from data.images import EXTENSIONS
from train.config import UserError

METADATA = "metadata.jsonl"
CAPTION_EXTENSIONS = (".txt", ".caption")
KINDS = EXTENSIONS | {*CAPTION_EXTENSIONS, ".jsonl"}
NAMED_AT_MOST = 20


@dataclass
class Listing:
    """The files of a resolved folder by id, and what came to light while looking at them."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # what is wrong, by file or line
    notes: list[str] = field(default_factory=list)  # what is odd, but no reason to stop

    @property
    def pictures(self) -> list[str]:
        """The ids with a picture's extension, in order."""
        return [name for name in self.files if extension(name) in EXTENSIONS]

    def read(self, name: str) -> bytes | None:
        """The file's bytes; None, and a problem, if it cannot be read."""
        try:
            return self.files[name].read_bytes()
        except OSError as error:
            self.problems[name] = f"cannot be read: {error.strerror or error}"
            return None


def list_folder(folder: Path) -> Listing:
    """Lists `folder` and all below it, sorted. Raises UserError where it is not a folder.

    Hidden files and folders are passed over. A link is followed to a file inside the folder only.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path={folder} {what}: give the folder that holds the pictures")
    listing = Listing(folder.resolve())
    for path in _walk(listing):
        _add(listing, path)
    listing.files = dict(sorted(listing.files.items()))
    kinds = Counter(extension(name) for name in listing.files if extension(name) not in KINDS)
    if kinds:
        names = [f"{count} x {kind or 'no extension'}" for kind, count in sorted(kinds.items())]
        listing.notes.append("files of kinds that are not read: " + ", ".join(names))
    return listing


def _add(listing: Listing, path: Path) -> None:
    name = _name(path, listing)
    problem = _problem(path, listing.folder)
    if name in listing.files:
        listing.problems[name] = "two files have this name but for its Unicode form: rename one"
    elif problem is None:
        listing.files[name] = path
    elif extension(name) in KINDS:
        listing.problems[name] = problem


def _walk(listing: Listing) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        listing.problems[_name(Path(error.filename), listing)] = f"cannot be read: {error.strerror}"

    for parent, folders, names in os.walk(listing.folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent) / name for name in folders):
            if path.is_symlink():
                problem = "links to folders are not followed: copy the pictures in"
                listing.problems[_name(path, listing)] = problem
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _problem(path: Path, folder: Path) -> str | None:
    try:
        if not path.resolve(strict=True).is_relative_to(folder):
            return "is a link to outside the folder: copy the file in"
        return None if stat.S_ISREG(path.stat().st_mode) else "is not a regular file"
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        return f"cannot be reached: {getattr(error, 'strerror', None) or error}"


def _name(path: Path, listing: Listing) -> str:
    return unicodedata.normalize("NFC", path.relative_to(listing.folder).as_posix())


def extension(name: str) -> str:
    """In lower case and with its dot."""
    return PurePosixPath(name).suffix.lower()


def stem(name: str) -> str:
    """The id without its extension, folders included."""
    return str(PurePosixPath(name).with_suffix(""))


def shown(name: str) -> str:
    """A file name as it can stand in a message, control characters escaped."""
    return name if name.isprintable() else ascii(name)


def first(lines: Sequence[str]) -> list[str]:
    """The first 20, and how many more there are."""
    rest = len(lines) - NAMED_AT_MOST
    return [*lines[:NAMED_AT_MOST], *([f"and {rest} more"] if rest > 0 else [])]


def few(what: str, names: Sequence[str]) -> str:
    """A note on some files, the first 20 by name."""
    return f"{what} ({len(names)}): {'; '.join(first([shown(name) for name in names]))}"
