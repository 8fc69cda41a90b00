"""Pictures read once, by several threads, and remembered: the index of what a scan found."""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from PIL import Image, UnidentifiedImageError

from data import images
from data.records import FILE, Record, Table
from train.config import UserError

MAX_FILE_BYTES = 1 << 30
READERS = min(8, os.cpu_count() or 1)
AT_ONCE = 16  # pictures a thread is given

T = TypeVar("T")
R = TypeVar("R")


class Facts(NamedTuple):
    """What there is to know of a picture's file."""

    file_bytes: int
    modified: int  # as `stamp` makes it
    sha256: str
    width: int  # pixels, upright
    height: int


def stamp(status: os.stat_result) -> tuple[int, int]:
    """A file's size in bytes, and a number of 63 bits that is another one once the file was written
    to, replaced or renamed. The modification time alone does not tell: two files of one batch can
    have the same, and be exchanged."""
    facts = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    return status.st_size, int.from_bytes(digest) >> 1


def examine(path: str, known: Record | None = None) -> Facts:
    """The facts of a picture, decoded to the last pixel unless it has the bytes of `known`, which
    are not even read where path and `stamp` are the same. Raises ValueError saying why it cannot be
    used."""
    try:
        status = os.stat(path)
        seen = stamp(status)
        if known is not None and (known.location, known.file_bytes, known.modified) == (
            FILE + path,
            *seen,
        ):
            return Facts(*seen, known.sha256, known.width, known.height)
        if not 0 < status.st_size <= MAX_FILE_BYTES:
            raise ValueError(wrong_size(status.st_size))
        with open(path, "rb") as file:
            content = file.read()
        sha256 = hashlib.sha256(content).hexdigest()
        if known is not None and known.sha256 == sha256:  # touched, linked or copied back
            return Facts(*seen, sha256, known.width, known.height)
        return Facts(*seen, sha256, *decoded_size(content))
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise ValueError(reason(error)) from None


def wrong_size(size: int) -> str:
    """Why a picture of so many bytes is not read."""
    if size == 0:
        return "is empty: it has no bytes"
    return f"has {size} bytes, and at most {MAX_FILE_BYTES} are read: save it smaller"


def decoded_size(content: bytes) -> images.Size:
    """The upright (width, height) of a picture, once all of it has been decoded.

    A JPEG is decoded at an eighth of its size, which reads every byte all the same and takes a
    sixth of the time. Raises what Pillow raises for a damaged file.
    """
    image = images.decode(io.BytesIO(content), cover=(1, 1))
    with Image.open(io.BytesIO(content), formats=images.FORMATS) as header:
        width, height = header.size
    return (height, width) if images.orientation(image) >= 5 else (width, height)


def reason(error: Exception) -> str:
    """Why a picture cannot be used, for a person."""
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return f"claims more pixels than the {images.MAX_PIXELS} that are read: scale it down"
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return str(error)
    return f"cannot be decoded: {error or type(error).__name__}"


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, by several threads, in the items' order; few are under way at a time."""
    rest = iter(items)
    pending: deque[Future[list[R]]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        while some := list(islice(rest, AT_ONCE)):
            pending.append(pool.submit(lambda some: [work(item) for item in some], some))
            if len(pending) > 2 * READERS:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def remembered(names: Iterable[str], rows: Iterable[Record]) -> Iterator[Record | None]:
    """The row of each name, where there is one; both are sorted."""
    rows = iter(rows)
    row = next(rows, None)
    for name in names:
        while row is not None and row.id < name:
            row = next(rows, None)
        yield row if row is not None and row.id == name else None


# The index -----------------------------------------------------------------------------------


class Lock:
    """Held while a source is scanned, so that of several processes one reads the pictures and the
    others find them in the index, all at once."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file

    def acquire(self) -> None:
        """Alone if nobody holds it; otherwise together with the others that had to wait."""
        if not self._flock(exclusive=True, wait=False):
            self._flock(exclusive=False, wait=True)

    def alone(self) -> None:
        """For writing."""
        self._flock(exclusive=True, wait=True)

    def _flock(self, *, exclusive: bool, wait: bool) -> bool:
        if self._file is None:
            return True
        import fcntl

        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(self._file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: each process does all of it
            self._file = None
        return True


@contextmanager
def locked(index: Path | None) -> Iterator[Lock]:
    """The lock beside the index, held; without one where it cannot be made."""
    file = None
    if index is not None:
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            file = open(index.with_name(f"{index.name}.lock"), "ab")  # noqa: SIM115
        except OSError:
            pass  # saying so is for the writing of the index
    try:
        lock = Lock(file)
        lock.acquire()
        yield lock
    finally:
        if file is not None:
            file.close()


def load(index: Path | None) -> Sequence[Record]:
    """The rows of the index; none where there is none that can be read."""
    if index is None:
        return []
    try:
        return Table.open(index)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError):
        return []


def store(index: Path | None, rows: Iterator[Record], known: Sequence[Record], lock: Lock) -> Table:
    """The rows as a table, in `index` where there is one. `known`, what is there already, is left
    as it is if the rows are the same. Raises UserError where it cannot be written."""
    if index is None:
        return Table.of(rows)
    same = 0
    for row, old in zip(rows, chain(known, _without_end()), strict=False):
        if row != old:
            fresh = chain(islice(known, same), [row], rows)
            return _write(index, fresh, lock)
        same += 1
    if isinstance(known, Table) and same == len(known):
        return known
    return _write(index, islice(known, same), lock)


def _without_end() -> Iterator[None]:
    while True:
        yield None


def _write(index: Path, rows: Iterable[Record], lock: Lock) -> Table:
    lock.alone()
    try:
        return Table.write(index, rows)
    except OSError as error:
        raise UserError(f"cannot write the index {index}: {error.strerror or error}") from error
