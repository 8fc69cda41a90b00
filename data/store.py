"""Tensors on disk under keys, many to a file: written whole or not at all, read by memory map.

    store = TensorStore(folder)
    with store.writer() as writer:
        writer.put(key, {"moments": moments})
    store.get(key)["moments"]

A key must say everything that its tensors depend on, so that the same key always holds the same
tensors: then duplicates, and several processes writing at once, do no harm. Entries go to *shards*,
safetensors files of up to 256 entries, 64 MiB or one minute of writing, whichever comes first: that
is the most that a killed process loses.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from data import shards
from data.files import Progress, silent
from data.shards import DAMAGED, SUFFIX, Kind
from train.config import UserError

if TYPE_CHECKING:
    import torch

    from data.upkeep import Damage, Pruned

ENTRIES, BYTES, SECONDS = 256, 64 << 20, 60.0  # a shard is closed at the first that it reaches
MAPS = 128  # shards mapped at once: each is an open file
USED_EVERY = 24 * 3600.0  # seconds between notes of a shard's last use
LOCK_SECONDS = 600.0  # how long a writer waits for a prune

T = TypeVar("T")
Tensors = dict[str, "torch.Tensor"]
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
DTYPES |= {"BOOL": "bool"}
NAMES = {f"torch.{name}": code for code, name in DTYPES.items()}


class _Rows(NamedTuple):
    """What the index knows of each tensor, sorted by the key's first half: 44 bytes a tensor."""

    head: np.ndarray  # uint64, first half of the key's identity
    tail: np.ndarray  # uint64, second half
    name: np.ndarray  # int32, position in the store's names
    kind: np.ndarray  # int32, position in its kinds
    shard: np.ndarray  # int32, position in its shards; -1 for a tensor that is lost
    start: np.ndarray  # int64, bytes from the beginning of the file
    checksum: np.ndarray  # uint64


_CODES = ("u8", "u8", "i4", "i4", "i4", "i8", "u8")
_NONE = _Rows(*(np.empty(0, code) for code in _CODES))


class _Numbered(Generic[T]):
    """Each different value once, by number."""

    def __init__(self) -> None:
        self._values: list[T] = []
        self._numbers: dict[T, int] = {}

    def number(self, value: T) -> int:
        if value not in self._numbers:
            self._numbers[value] = len(self._values)
            self._values.append(value)
        return self._numbers[value]

    def __getitem__(self, number: int) -> T:
        return self._values[number]


class _Lost(Exception):
    """A tensor that cannot be read as it was written; the argument is its row."""


class TensorStore:
    """Named tensors by key, in the shards of `folder`/shards.

    What the shards hold is known from their headers, read at the first question. Any number of
    processes may read and write at once; `refresh` takes note of what others have written since.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.shards = self.folder / "shards"
        self._rows = _NONE
        self._shard_names: list[str] = []  # by number
        self._numbers: dict[str, int] = {}  # of the shards that are there
        self._names = _Numbered[str]()
        self._kinds = _Numbered[Kind]()
        self._marks: set[str] = set()
        self._used: dict[int, float] = {}
        self._stale = True
        self._map: Callable[[int], mmap.mmap | bytes] = lru_cache(MAPS)(self._open)

    def __reduce__(self) -> tuple[type[TensorStore], tuple[Path]]:
        return type(self), (self.folder,)

    # Reading

    def names(self, key: str) -> frozenset[str]:
        """The names of the tensors under `key`, without reading them; none if it is missing."""
        rows = self._find(key)
        for row in rows:
            self._note_use(int(self._rows.shard[row]))
        return frozenset(self._names[self._rows.name[row]] for row in rows)

    def shape(self, key: str, name: str) -> tuple[int, ...] | None:
        """The shape of one tensor, without reading it; None if it is missing."""
        for row in self._find(key):
            if self._names[self._rows.name[row]] == name:
                return self._kinds[self._rows.kind[row]].shape
        return None

    def get(self, key: str, names: Collection[str] | None = None) -> Tensors | None:
        """The tensors under `key` on the CPU, or those of `names` that there are; None where the
        key is missing.

        Each is a copy of its own. An entry of which anything read is damaged is missing from then
        on, in this process and in later ones.
        """
        for _ in range(3):  # a prune may move an entry to another shard, even twice
            with suppress(FileNotFoundError):
                tensors = self._get(key, names)
                if tensors is not None:
                    return tensors
            if not self.refresh():
                break
        return None

    def _get(self, key: str, names: Collection[str] | None) -> Tensors | None:
        there = self.names(key)
        while rows := self._find(key):
            by_name = {self._names[self._rows.name[row]]: row for row in rows}
            if by_name.keys() != there:
                self._lose(key, rows)  # half an entry could pass for a whole one
                break
            wanted = by_name if names is None else by_name.keys() & set(names)
            try:
                return {name: self._tensor(key, name, by_name[name]) for name in wanted}
            except _Lost as lost:
                shard = self._rows.shard[lost.args[0]]
                self._lose(key, [row for row in rows if self._rows.shard[row] == shard])
        return None

    def _tensor(self, key: str, name: str, row: int) -> torch.Tensor:
        import torch

        kind = self._kinds[self._rows.kind[row]]
        start = int(self._rows.start[row])
        shard = int(self._rows.shard[row])
        data = bytearray(memoryview(self._map(shard))[start : start + kind.bytes])
        if shards.checksum(key, name, kind, data) != self._rows.checksum[row]:
            raise _Lost(row)
        dtype = getattr(torch, DTYPES[kind.dtype])
        if not data:
            return torch.empty(kind.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(kind.shape)

    def _open(self, shard: int) -> mmap.mmap | bytes:
        try:
            with (self.shards / self._shard_names[shard]).open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            return b""  # what cannot be mapped is an empty file
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"cannot read the cache in {self.folder}: {error}; mend that, or choose another "
                "folder"
            ) from error

    def _lose(self, key: str, rows: Iterable[int]) -> None:
        """Forgets damaged tensors, here and, by a mark beside their shard, for later processes."""
        for row in rows:
            shard = int(self._rows.shard[row])
            if shard >= 0:
                mark = shards.damage_mark(self._shard_names[shard], shards.identity(key))
                self._rows.shard[row] = -1
                self._marks.add(mark)
                with suppress(OSError):  # a read-only cache: each process finds out for itself
                    (self.shards / mark).touch()

    def _note_use(self, shard: int) -> None:
        """The time a shard was last of use is that of its file, to the day."""
        now = time.time()
        if now - self._used.get(shard, 0.0) < USED_EVERY:
            return
        self._used[shard] = now
        path = self.shards / self._shard_names[shard]
        with suppress(OSError):
            if now - path.stat().st_mtime > USED_EVERY:
                os.utime(path)

    # The index

    def refresh(self) -> bool:
        """Takes note of what other processes wrote or removed; True where there was anything."""
        self._stale = False
        there = shards.listing(self.shards, SUFFIX)
        lost = self._numbers.keys() - there
        self._drop([self._numbers.pop(name) for name in lost])
        new = sorted(there - self._numbers.keys())
        self._add([self._load(name) for name in new])
        marks = shards.listing(self.shards, DAMAGED) - self._marks
        for mark in marks:
            self._apply(mark)
        return bool(lost or new or marks)

    def _load(self, name: str) -> _Rows:
        number = len(self._shard_names)
        self._shard_names.append(name)
        self._numbers[name] = number
        try:
            parts = shards.parts(self.shards / name)
        except (shards.Broken, OSError):
            return _NONE  # as if it were not there; `verify` names it
        identities = [shards.identity(part.key) for part in parts]
        columns = (
            [value >> 64 for value in identities],
            [value & (1 << 64) - 1 for value in identities],
            [self._names.number(part.name) for part in parts],
            [self._kinds.number(part.kind) for part in parts],
            [number] * len(parts),
            [part.start for part in parts],
            [part.checksum for part in parts],
        )
        return _Rows(*map(np.array, columns, _CODES))

    def _add(self, new: list[_Rows]) -> None:
        if not new:
            return
        # Stable, which on runs that are sorted already is a merge.
        order = np.concatenate([self._rows.head, *(rows.head for rows in new)]).argsort(
            kind="stable"
        )
        self._rows = _Rows(
            *(np.concatenate(column)[order] for column in zip(self._rows, *new, strict=True))
        )

    def _drop(self, numbers: Sequence[int]) -> None:
        if numbers:
            keep = ~np.isin(self._rows.shard, numbers)
            self._rows = _Rows(*(column[keep] for column in self._rows))

    def _apply(self, mark: str) -> None:
        self._marks.add(mark)
        with suppress(ValueError):
            name, key = shards.marked(mark)
            number = self._numbers.get(name)
            for row in self._at(key):
                if self._rows.shard[row] == number:
                    self._rows.shard[row] = -1

    def _find(self, key: str) -> list[int]:
        """The rows of a key's tensors."""
        if self._stale:
            self.refresh()
        return self._at(shards.identity(key))

    def _at(self, identity: int) -> list[int]:
        head, tail = np.uint64(identity >> 64), np.uint64(identity & (1 << 64) - 1)
        rows, found = self._rows, []
        row = int(rows.head.searchsorted(head))
        while row < len(rows.head) and rows.head[row] == head:
            if rows.tail[row] == tail and rows.shard[row] >= 0:
                found.append(row)
            row += 1
        return found

    # Writing and upkeep

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """What entries are put into. They are seen once their shard is written, at the end at the
        latest. Raises UserError where the folder cannot be written."""
        with writable(self.folder):
            self.shards.mkdir(parents=True, exist_ok=True)
            shards.remove_leftovers(self.shards)
        with locked(self.folder, exclusive=False):
            writer = Writer(self)
            try:
                yield writer
            except BaseException:
                with suppress(UserError):
                    writer.flush()  # what is done stays done
                raise
            writer.flush()

    def verify(self, *, repair: bool = False, progress: Progress = silent) -> list[Damage]:
        """Reads everything and names what is damaged; with `repair`, takes it out.
        `progress(done, total)` counts shards."""
        from data import upkeep

        self._stale = True
        with writable(self.folder):
            return upkeep.verify(self.folder, self.shards, repair=repair, progress=progress)

    def prune(
        self,
        keep: Iterable[str] | None = None,
        *,
        unused_days: float | None = None,
        progress: Progress = silent,
    ) -> Pruned:
        """Removes the entries whose keys are not in `keep` and the shards that no run has used for
        so many days; merges small shards, and drops duplicates. Raises UserError while another
        process writes."""
        from data import upkeep

        self._stale = True
        with writable(self.folder):
            return upkeep.prune(
                self.folder, self.shards, keep=keep, unused_days=unused_days, progress=progress
            )


class Writer:
    """Gathers entries into shards (see the module)."""

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._tensors: list[shards.Tensor] = []
        self._entries = self._bytes = 0
        self._since = time.monotonic()

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Adds an entry, or more tensors to one. Raises UserError where it cannot be written."""
        assert key and "/" not in key
        if not self._entries:
            self._since = time.monotonic()
        self._entries += 1
        for name, tensor in tensors.items():
            self._tensors.append(_stored(key, name, tensor))
            self._bytes += len(self._tensors[-1].data)
        waited = time.monotonic() - self._since
        if self._entries >= ENTRIES or self._bytes >= BYTES or waited >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was put."""
        tensors, self._tensors = self._tensors, []
        self._entries = self._bytes = 0
        if tensors:
            with writable(self._store.folder):
                shards.write(self._store.shards, tensors)
            self._store._stale = True


def _stored(key: str, name: str, tensor: torch.Tensor) -> shards.Tensor:
    import torch

    # A copy, so that a row of a batch does not keep the batch, nor change with it.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return shards.Tensor(
        key, name, Kind(NAMES[str(tensor.dtype)], tuple(tensor.shape)), flat.tobytes()
    )


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the cache in {folder}: {error.strerror or error}; free some space there "
            "or choose another folder"
        ) from error


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Holds the folder's lock: shared by writers, one after another for what removes entries.

    A writer waits for a prune to end. Raises UserError where the lock cannot be had. On file
    systems without locks there is none: then a prune while a run fills the cache may take entries
    that the run relies on, which it says and mends when it is run again.
    """
    with writable(folder):
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, folder, exclusive)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, exclusive: bool) -> None:
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    until = time.monotonic() + (0.0 if exclusive else LOCK_SECONDS)
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise UserError(_busy(folder, exclusive)) from None
            time.sleep(0.2)
        except OSError:
            return


def _busy(folder: Path, exclusive: bool) -> str:
    if exclusive:
        return f"another process is writing to the cache in {folder}: try again when it is done"
    return f"the cache in {folder} is being pruned or repaired: try again when that is done"
