"""One shard of the cache: many named tensors in one safetensors file, with a checksum each.

A tensor's name in the file is KEY/NAME. Its checksum, in the header's metadata, covers key, name,
kind and bytes, so that neither a flipped bit nor a muddled header ever passes for data.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data.files import whole

SUFFIX, DAMAGED = ".safetensors", ".damaged"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
HEADER_BYTES = 64 << 20  # more than this is not a header that was written here
DIMENSIONS = 16
LEFTOVER_SECONDS = 3600  # a live process renames its temporary file within seconds


class Broken(ValueError):
    """A shard whose header cannot be used; the message says why."""


class Kind(NamedTuple):
    """How a tensor's bytes are read: a safetensors dtype and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Part(NamedTuple):
    """One tensor of a shard: `start` and `end` are bytes from the beginning of the file."""

    key: str
    name: str
    kind: Kind
    start: int
    end: int
    checksum: int


class Tensor(NamedTuple):
    """A tensor as bytes, to be written."""

    key: str
    name: str
    kind: Kind
    data: bytes | memoryview


def identity(key: str) -> int:
    """128 bits that stand for a key."""
    return xxhash.xxh3_128_intdigest(key.encode())


def checksum(key: str, name: str, kind: Kind, data: Any) -> int:
    """64 bits of the tensor and all that is said of it."""
    said = f"{key}/{name} {kind.dtype} {kind.shape}"
    return xxhash.xxh3_64_intdigest(data, seed=xxhash.xxh3_64_intdigest(said.encode()))


def write(folder: Path, tensors: Sequence[Tensor]) -> Path:
    """A new shard of these tensors, whole or not at all. Raises OSError."""
    header: dict[str, Any] = {"__metadata__": {}}
    position = 0
    for key, name, kind, data in tensors:
        end = position + len(data)
        header[f"{key}/{name}"] = {
            "dtype": kind.dtype,
            "shape": kind.shape,
            "data_offsets": (position, end),
        }
        header["__metadata__"][f"{key}/{name}"] = f"{checksum(key, name, kind, data):016x}"
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    path = folder / f"{_new_name(tensors)}{SUFFIX}"
    with whole(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            file.write(tensor.data)
    return path


def _new_name(tensors: Sequence[Tensor]) -> str:
    """Never used before: what is said of a damaged shard must not be taken for another."""
    where = f"{os.uname().nodename} {os.getpid()} {time.time_ns()}"
    keys = (tensor.key for tensor in tensors)
    return xxhash.xxh3_128_hexdigest(" ".join([where, *keys]).encode())


def parts(path: Path) -> list[Part]:
    """The tensors of a shard, from its header alone. Raises Broken, or OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, HEADER_BYTES):
            raise Broken("its header is cut short or is none")
        text = file.read(length)
    try:
        header = json.loads(text)
        sums = header.pop("__metadata__")
        found = [_part(name, said, sums[name], 8 + length) for name, said in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Broken(f"its header makes no sense ({type(error).__name__})") from None
    if max((part.end for part in found), default=8 + length) != size:
        raise Broken(f"it has {size} bytes, and its header says otherwise")
    return found


def _part(full_name: str, said: dict[str, Any], checksum: str, data: int) -> Part:
    key, slash, name = full_name.partition("/")
    start, end = said["data_offsets"]
    kind = Kind(said["dtype"], tuple(said["shape"]))
    numbers = (start, end, *kind.shape)
    if not (key and slash and name and len(kind.shape) <= DIMENSIONS):
        raise ValueError(full_name)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(full_name)
    if end - start != kind.bytes or not 0 <= int(checksum, 16) < 1 << 64:
        raise ValueError(full_name)
    full_name.encode()  # not half a surrogate pair
    return Part(key, name, kind, data + start, data + end, int(checksum, 16))


def read(path: Path, wanted: Sequence[Part]) -> Iterator[Tensor | None]:
    """These tensors of a shard, one after another; None for a damaged one. Raises OSError."""
    with path.open("rb") as file:
        for part in wanted:
            file.seek(part.start)
            data = file.read(part.end - part.start)
            sound = checksum(part.key, part.name, part.kind, data) == part.checksum
            yield Tensor(part.key, part.name, part.kind, data) if sound else None


def damage_mark(shard: str, key: int) -> str:
    """The name of the empty file that says: this key's tensors in this shard are damaged."""
    return f"{shard.removesuffix(SUFFIX)}.{key:032x}{DAMAGED}"


def marked(mark: str) -> tuple[str, int]:
    """The shard's name and the key's identity that `damage_mark` was given. Raises ValueError."""
    stem, key = mark.removesuffix(DAMAGED).rsplit(".", 1)
    return f"{stem}{SUFFIX}", int(key, 16)


def listing(folder: Path, suffix: str) -> set[str]:
    """The names in `folder` that end so; none where there is no folder."""
    try:
        return {name for name in os.listdir(folder) if name.endswith(suffix) and name[0] != "."}
    except FileNotFoundError:
        return set()


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed writers left; a live one's are never that old."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()
