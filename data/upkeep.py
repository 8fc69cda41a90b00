"""Upkeep of a store's shards: finding and removing what is damaged, unused or twice there.

Nothing is changed in place: what is kept is written to a new shard first, and only then is the old
one removed. Killed at any point, this leaves duplicates at worst.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from data import shards
from data.files import Progress, silent
from data.shards import DAMAGED, SUFFIX, Part
from data.store import BYTES, ENTRIES, USED_EVERY, locked
from train.config import UserError

DAY = 24 * 3600.0


class Damage(NamedTuple):
    """What is wrong with a shard, or with one of its tensors where `key` is given."""

    shard: Path
    key: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{f', entry {self.key}' if self.key else ''}: {self.reason}"


@dataclass(frozen=True)
class Pruned:
    """What a prune did: entries (keys) and bytes."""

    kept: int
    removed: int
    freed: int


def verify(
    root: Path, folder: Path, *, repair: bool = False, progress: Progress = silent
) -> list[Damage]:
    """Every damage in the shards of `folder`, and with `repair` none of it left."""
    if not repair:
        return _verify(folder, None, progress)
    if not folder.is_dir():
        return []
    with locked(root, exclusive=True):
        return _verify(folder, _Copy(folder), progress)


def _verify(folder: Path, copy: _Copy | None, progress: Progress) -> list[Damage]:
    found: list[Damage] = []
    names = sorted(shards.listing(folder, SUFFIX))
    marks = _marks(folder)
    for done, name in enumerate(names):
        progress(done, len(names))
        path = folder / name
        try:
            damage, sound = _check(path, marks.get(name, set()))
        except FileNotFoundError:
            continue  # pruned meanwhile
        found += damage
        if copy and damage:
            copy.take(path, sound)
    if copy:
        copy.finish()
    progress(len(names), len(names))
    return found


def _check(path: Path, marked: set[int]) -> tuple[list[Damage], list[Part]]:
    """What is damaged in a shard, and its sound tensors."""
    try:
        parts = shards.parts(path)
        damage, sound = [], []
        for part, tensor in zip(parts, shards.read(path, parts), strict=True):
            if tensor is None:
                damage.append(Damage(path, part.key, f"its {part.name} are damaged"))
            elif shards.identity(part.key) in marked:
                damage.append(Damage(path, part.key, "a run found it damaged"))
            else:
                sound.append(part)
        return damage, sound
    except FileNotFoundError:
        raise
    except shards.Broken as error:
        return [Damage(path, None, str(error))], []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def prune(
    root: Path,
    folder: Path,
    *,
    keep: Iterable[str] | None = None,
    unused_days: float | None = None,
    progress: Progress = silent,
) -> Pruned:
    """See `TensorStore.prune`."""
    if not folder.is_dir():
        return Pruned(0, 0, 0)
    wanted = None if keep is None else {_short(key) for key in keep}
    before = None
    if unused_days is not None:  # a use may be a day younger than what is noted
        before = time.time() - unused_days * DAY - (USED_EVERY if unused_days else 0.0)
    with locked(root, exclusive=True):
        return _prune(folder, wanted, before, progress)


def _prune(
    folder: Path, wanted: set[int] | None, before: float | None, progress: Progress
) -> Pruned:
    shards.remove_leftovers(folder)
    size, marks, copy = _bytes(folder), _marks(folder), _Copy(folder)
    there: set[int] = set()  # keys
    kept: set[int] = set()  # keys
    seen: set[int] = set()  # tensors
    # Those last used at about the same time come together, and so may go together one day.
    names = sorted(shards.listing(folder, SUFFIX), key=lambda name: _last_use(folder / name))
    for done, name in enumerate(names):
        progress(done, len(names))
        path = folder / name
        parts = _parts(path)
        unused = before is not None and _last_use(path) < before
        stay = [
            part
            for part in ([] if unused else parts)
            if (wanted is None or _short(part.key) in wanted)
            and shards.identity(part.key) not in marks.get(name, ())
            and _short(f"{part.key}/{part.name}") not in seen
        ]
        there.update(_short(part.key) for part in parts)
        if len(stay) < len(parts) or not parts:
            stay = copy.take(path, stay)
        elif _small(parts):
            stay = copy.take(path, stay, alone=False)
        seen.update(_short(f"{part.key}/{part.name}") for part in stay)
        kept.update(_short(part.key) for part in stay)
    copy.finish()
    progress(len(names), len(names))
    return Pruned(len(kept), len(there - kept), size - _bytes(folder))


class _Copy:
    """Brings sound tensors from old shards to new ones, and then removes the old ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: list[shards.Tensor] = []
        self._bytes = 0
        self._sources: list[Path] = []  # read to the end, and to be removed with the next flush
        self._needed = False  # not where the only source would be written as it was
        self._modified = 0.0

    def take(self, path: Path, parts: Sequence[Part], *, alone: bool = True) -> list[Part]:
        """Copies these tensors of a shard and gives it up for removal; returns the sound ones.
        With `alone` False only where it can be joined to another."""
        self._needed |= alone or bool(self._sources)
        self._modified = max(self._modified, _last_use(path))
        sound = []
        for part, tensor in zip(parts, shards.read(path, parts), strict=True):
            if tensor is not None:
                sound.append(part)
                self._tensors.append(tensor)
                self._bytes += len(tensor.data)
                if len(self._tensors) >= ENTRIES or self._bytes >= BYTES:
                    self._flush()
                    self._needed = True  # the rest of this one, too
        self._sources.append(path)
        return sound

    def finish(self) -> None:
        """Writes what is left, and removes the marks of damage that have lost their shard."""
        if self._needed:
            self._flush()
        for mark in shards.listing(self._folder, DAMAGED):
            with suppress(ValueError):
                if not (self._folder / shards.marked(mark)[0]).exists():
                    (self._folder / mark).unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._tensors:
            path = shards.write(self._folder, self._tensors)
            os.utime(path, (self._modified, self._modified))
        for path in self._sources:
            path.unlink()
        self._tensors, self._bytes, self._sources, self._needed = [], 0, [], False


def _parts(path: Path) -> list[Part]:
    try:
        return shards.parts(path)
    except shards.Broken:
        return []


def _small(parts: Sequence[Part]) -> bool:
    return len(parts) < ENTRIES / 2 and sum(part.kind.bytes for part in parts) < BYTES / 2


def _short(text: str) -> int:
    """64 bits that stand for a text, for sets of millions."""
    return xxhash.xxh3_64_intdigest(text.encode())


def _last_use(path: Path) -> float:
    return path.stat().st_mtime


def _bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _marks(folder: Path) -> dict[str, set[int]]:
    """The identities of the keys marked as damaged, by shard."""
    found: dict[str, set[int]] = {}
    for mark in shards.listing(folder, DAMAGED):
        with suppress(ValueError):
            shard, key = shards.marked(mark)
            found.setdefault(shard, set()).add(key)
    return found
