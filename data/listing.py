"""What lies in a folder: its visible regular files by name, and everything that is wrong there.

Of each file only its name is kept, in one sorted list, so that a million of them fit in memory;
what stands beside a picture is found in it by bisection.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.images import EXTENSIONS, UNREADABLE_EXTENSIONS
from train.config import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_EXTENSIONS = (".txt", ".caption")
FOCUS = ".focus.json"
NAMED_AT_MOST = 20
SHOWN_AT_MOST = 600  # characters of a name
MAX_TEXT_BYTES = 64 << 10  # of a text file beside a picture: far above any caption
_NOT_REGULAR = "is not a regular file: remove it"
_LINKED_FOLDER = "links to folders are not followed: copy the pictures in"
_LAST = "\U0010ffff"  # sorts after every character of a name


@dataclass
class Listing:
    """The files of a resolved folder by id, and what came to light while looking at them."""

    folder: Path
    names: list[str] = field(default_factory=list)  # sorted; only kinds of file that are read
    problems: dict[str, str] = field(default_factory=dict)  # what is wrong, by file or line
    notes: list[str] = field(default_factory=list)  # what is odd, but no reason to stop
    spelled: dict[str, str] = field(default_factory=dict)  # the name on disk, where it is not NFC

    def __contains__(self, name: str) -> bool:
        at = self.position(name)
        return at < len(self.names) and self.names[at] == name

    def position(self, name: str) -> int:
        """Where the name is in `names`, or would be."""
        return bisect_left(self.names, name)

    def starting(self, prefix: str) -> Sequence[str]:
        """The names that begin so, in order."""
        return self.names[self.position(prefix) : self.position(prefix + _LAST)]

    def with_stem(self, stem: str) -> list[str]:
        """The files that have this name but for their extension."""
        return [name for name in self.starting(stem + ".") if split(name)[0] == stem]

    def pictures_named(self, stem: str) -> list[str]:
        """Those of them that have a picture's extension."""
        return [name for name in self.with_stem(stem) if extension(name) in EXTENSIONS]

    @property
    def pictures(self) -> list[str]:
        """The ids with a picture's extension, in order."""
        return [name for name in self.names if extension(name) in EXTENSIONS]

    @property
    def files(self) -> Mapping[str, Path]:
        """The path of each name, made when it is asked for."""
        return _Files(self)

    def path(self, name: str) -> str:
        """The absolute path of a name."""
        return f"{self.folder}/{self.spelled.get(name, name)}"

    def text(self, name: str) -> str:
        """What a small UTF-8 file holds. Raises ValueError saying why it cannot be had."""
        try:
            with open(self.path(name), "rb") as file:
                content = file.read(MAX_TEXT_BYTES + 1)
            if len(content) > MAX_TEXT_BYTES:
                raise ValueError(f"has more than {MAX_TEXT_BYTES} bytes: shorten it")
            if b"\0" in content:
                raise ValueError("holds NUL bytes, so is not UTF-8: save it as UTF-8")
            return content.decode("utf-8-sig")
        except OSError as error:
            why = f"cannot be read: {error.strerror or error}"
        except UnicodeDecodeError as error:
            why = f"is not UTF-8 (byte {error.start}): save it as UTF-8"
        except ValueError as error:
            why = str(error)
        raise ValueError(f"{shown(name)} {why}")


class _Files(Mapping[str, Path]):
    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def __getitem__(self, name: str) -> Path:
        if name not in self._listing:
            raise KeyError(name)
        return Path(self._listing.path(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._listing.names)

    def __len__(self) -> int:
        return len(self._listing.names)


def list_folder(folder: Path) -> Listing:
    """Lists `folder` and all below it, sorted. Raises UserError where it is not a folder.

    Hidden files and folders are passed over. A link is followed to a file inside the folder only.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path={folder} {what}: give the folder that holds the pictures")
    listing = Listing(folder.resolve())
    _demand_utf8(listing.folder)
    kinds: Counter[str] = Counter()
    for entry, name in _walk(listing):
        if is_read(name) or entry.is_symlink():
            _add(listing, entry, name)
        else:
            kinds[extension(name)] += 1
    listing.names.sort()
    _drop_twins(listing)
    if kinds:
        counted = [
            f"{count} x {shown(kind) or 'no extension'}" for kind, count in sorted(kinds.items())
        ]
        listing.notes.append("files of kinds that are not read: " + ", ".join(counted))
    return listing


def _demand_utf8(folder: Path) -> None:
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"data.path={_id(str(folder))} is a path that is not UTF-8: rename the folder"
        ) from None


def is_read(name: str) -> bool:
    """Whether it is a kind of file that a source is made of."""
    kind = extension(name)
    if kind in EXTENSIONS or kind in CAPTION_EXTENSIONS or kind in UNREADABLE_EXTENSIONS:
        return True
    return name.endswith(FOCUS) or posixpath.basename(name) in METADATA


def _walk(listing: Listing) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every visible file below the folder with its name; no order."""
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            with os.scandir(f"{listing.folder}/{parent}") as entries:
                for entry in entries:
                    name = parent + entry.name
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(listing, entry, name):
                        pending.append(f"{name}/")
                    else:
                        yield entry, name
        except OSError as error:
            listing.problems[_id(parent[:-1])] = f"cannot be read: {error.strerror or error}"


def _is_folder(listing: Listing, entry: os.DirEntry[str], name: str) -> bool:
    """Whether to go into it."""
    if not entry.is_dir(follow_symlinks=False):
        return False
    if extension(name) in EXTENSIONS:
        listing.notes.append(f"{shown(name)} is a folder, though it is named like a picture")
    return True


def _add(listing: Listing, entry: os.DirEntry[str], spelled: str) -> None:
    name = _id(spelled)
    problem, wanted = _problem(listing.folder, entry, spelled), is_read(spelled)
    if problem is not None and (wanted or problem is _LINKED_FOLDER):
        listing.problems[name] = problem
    elif problem is None and wanted:
        if name != spelled:
            listing.spelled[name] = spelled
        listing.names.append(name)
        if extension(name) in UNREADABLE_EXTENSIONS:
            listing.problems[name] = UNREADABLE_EXTENSIONS[extension(name)]


def _problem(folder: Path, entry: os.DirEntry[str], spelled: str) -> str | None:
    try:
        spelled.encode()
        if not entry.is_symlink():
            return None if entry.is_file() else _NOT_REGULAR
        target = Path(entry.path).resolve(strict=True)
        if target.is_dir():
            return _LINKED_FOLDER
        if not target.is_relative_to(folder):
            return "is a link to outside the folder: copy the file in"
        return None if target.is_file() else _NOT_REGULAR
    except UnicodeEncodeError:
        return "has a name that is not UTF-8: rename it"
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        return f"cannot be reached: {getattr(error, 'strerror', None) or error}; remove it"


def _drop_twins(listing: Listing) -> None:
    """Files whose names differ in their Unicode form only are all problems, and none is used."""
    twins = {a for a, b in zip(listing.names, listing.names[1:], strict=False) if a == b}
    for name in twins:
        listing.problems[name] = "two files have this name but for its Unicode form: rename one"
    if twins:
        listing.names = [name for name in listing.names if name not in twins]


def _id(spelled: str) -> str:
    """In Unicode NFC, and such that it can be written down."""
    if spelled.isascii():
        return spelled
    name = unicodedata.normalize("NFC", spelled)
    return name.encode("utf-8", "backslashreplace").decode()


def split(name: str) -> tuple[str, str]:
    """The id without its extension, folders included, and the extension with its dot."""
    return posixpath.splitext(name)


def extension(name: str) -> str:
    """In lower case and with its dot."""
    return split(name)[1].lower()


def stem(name: str) -> str:
    """The id without its extension, folders included."""
    return split(name)[0]


class Tally:
    """How many there are of something, and the first 20 names."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.count = 0
        self.names: list[str] = []
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < NAMED_AT_MOST:
            self.names.append(shown(name))

    def note(self, what: str) -> list[str]:
        """The note on them, or none where there are none."""
        rest = [f"and {self.count - len(self.names)} more"] if self.count > len(self.names) else []
        return [f"{what} ({self.count}): {'; '.join(self.names + rest)}"] if self.count else []


def shown(name: str) -> str:
    """A file name as it can stand in a message: control characters escaped, and of a length that
    a name in a metadata file need not have."""
    plain = name if name.isprintable() else ascii(name)
    return plain if len(plain) <= SHOWN_AT_MOST else f"{plain[:SHOWN_AT_MOST]}..."


def few(what: str, names: Sequence[str]) -> str:
    """A note on some files, the first 20 by name."""
    return f"{what} ({len(names)}): {'; '.join(first([shown(name) for name in names]))}"


def first(lines: Sequence[str]) -> list[str]:
    """The first 20, and how many more there are."""
    rest = len(lines) - NAMED_AT_MOST
    return [*lines[:NAMED_AT_MOST], *([f"and {rest} more"] if rest > 0 else [])]
