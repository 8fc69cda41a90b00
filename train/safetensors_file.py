"""The header of a safetensors file from anywhere, read within bounds and checked to the last byte;
and files of our own.

The format (github.com/huggingface/safetensors, README): 8 bytes with the header's length, the
header as JSON, then the tensors' bytes. The library checks most of this too, but takes headers of
100 MB, keeps quiet about names that are there twice, and waits for ever at a pipe.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data.files import write_atomically
from train.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 10 << 20  # a whole SDXL takes 0.4 MB; parsed, that is 0.4 GB at the very worst
MAX_TENSORS = 50_000  # a whole SDXL with its LoRAs has a tenth of them
MAX_DIMENSIONS = 16
_NAME_SHOWN = 120  # characters

# Bits of one number, by the kinds that PyTorch reads.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8}
_BITS |= {"F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32}
_BITS |= {"F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}


@dataclass(frozen=True)
class Entry:
    """A tensor: the kind of its numbers ("F32", "BF16"...), its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    """Byte of the file."""
    last: int
    """The byte after its last."""


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """What a safetensors file holds, none of its tensors read.

    Raises UserError, naming the file and what is wrong, unless it is a regular file whose tensors
    fill it without gap or overlap, each name once and each as long as its shape says.
    """
    try:
        with open_regular(file) as stream:
            content = _json(stream)
            start, size = stream.tell(), os.fstat(stream.fileno()).st_size
        metadata = _metadata(content.pop("__metadata__", {}))
        tensors = {name: _entry(name, about, start) for name, about in content.items()}
        _check_places(tensors, start, size)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{file} cannot be read as safetensors ({why}): download, copy or export it again"
        ) from None
    return Header(tensors, metadata)


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a file whose bytes are a function of tensors and metadata, whole or not at all."""
    write_atomically(file, safetensors_content(tensors, metadata))


def safetensors_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of such a file."""
    from safetensors.torch import save

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return in_order(save(whole, dict(metadata)))


def in_order(content: bytes) -> bytes:
    """A file's content with its metadata sorted: safetensors writes them in an order that differs
    from process to process, and a hash of the file should not."""
    end = end_of_header(content)
    header = json.loads(content[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[end:]


def end_of_header(content: bytes) -> int:
    """Where the tensors' bytes begin."""
    return 8 + int.from_bytes(content[:8], "little")


def read_bytes(file: Path, entry: Entry) -> bytes:
    """The bytes of one tensor."""
    with open_regular(file) as stream:
        stream.seek(entry.first)
        return stream.read(entry.last - entry.first)


def shown(name: str) -> str:
    """A name from such a file as it can stand in a message: of one line, of bounded length, and
    without what would move a terminal's cursor."""
    plain = name if name.isprintable() else ascii(name)
    return plain if len(plain) <= _NAME_SHOWN else f"{plain[:_NAME_SHOWN]}..."


def open_regular(file: Path) -> IO[bytes]:
    """The file, to be read, unless it is a pipe or a device: the one would make this wait, the
    other never end. Raises OSError or ValueError."""
    stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError("it is no regular file")
    return stream


def _json(stream: IO[bytes]) -> dict[str, Any]:
    """The header's content; the stream is then where the tensors begin."""
    beginning = stream.read(8)
    length = int.from_bytes(beginning, "little")
    if len(beginning) < 8 or length < 2:
        raise ValueError("it has no header")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    text = stream.read(length)
    if len(text) < length:
        raise ValueError(f"it ends within its header, which claims {length} bytes")
    if not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    try:
        content = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    assert isinstance(content, dict)
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON, whose names must differ."""
    if len(pairs) > MAX_TENSORS:
        raise ValueError(f"its header names {len(pairs)} tensors, at most {MAX_TENSORS} are read")
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"its header has {shown(name)} twice")
    return found


def _no_constant(word: str) -> None:
    """Python would read NaN and Infinity, which JSON does not have."""
    raise ValueError(f"its header holds {word}")


def _metadata(content: Any) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ValueError("its __metadata__ is not of names and texts")
    for text in (*content, *content.values()):
        if not text.isascii():
            text.encode()  # half a character would be refused wherever it is written or read
    return content


def _entry(name: str, about: Any, start: int) -> Entry:
    what = f"its tensor {shown(name)}"
    if not name.isascii():
        name.encode()  # half a character would be refused wherever it is written
    match about:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, last]} if (
            len(about) == 3
        ):
            pass
        case _:
            raise ValueError(f"{what} is not described by dtype, shape and data_offsets alone")
    if dtype not in _BITS:
        raise ValueError(f"{what} is of an unknown kind of numbers, {shown(dtype)}")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{what} has no possible shape")
    if not (type(first) is type(last) is int and 0 <= first <= last):
        raise ValueError(f"{what} has no possible place")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (last - first):
        raise ValueError(f"{what} does not have the bytes that its shape needs")
    return Entry(dtype, tuple(shape), start + first, start + last)


def _check_places(tensors: Mapping[str, Entry], start: int, size: int) -> None:
    """That the tensors fill the file from `start` to its end."""
    at = start
    for name, entry in sorted(tensors.items(), key=lambda one: (one[1].first, one[1].last)):
        if entry.first != at:
            what = "overlaps another" if entry.first < at else "leaves a gap before it"
            raise ValueError(f"its tensor {shown(name)} {what}")
        at = entry.last
    if at != size:
        what = "is cut short" if at > size else "goes on after its tensors"
        raise ValueError(f"it {what}: {size} bytes, where its header needs {at}")
