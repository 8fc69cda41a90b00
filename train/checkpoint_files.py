"""The files of a checkpoint: hashed while they are written, on the disk before they are named, and
checked before they are used.

Tensors lie in safetensors' format: the header's length (8 bytes, little-endian), a header of JSON,
and the tensors one after the other (https://github.com/huggingface/safetensors#format). The same
state gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train.config import RunFailed

FORMAT = 1
MANIFEST = "manifest.json"
_NEEDED = ("model.safetensors", "optimizer.safetensors")
_CHUNK = 4 * 2**20  # bytes that are written, and meanwhile hashed, at a time
_AHEAD = 8  # pieces at most that are written but not hashed yet
_MANIFEST_BYTES = 64 * 2**20  # at most: a few numbers for each parameter

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Of the same width, where numpy has no such numbers.
_NOT_NUMPYS = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


class DamagedCheckpoint(RunFailed):
    """A checkpoint whose files do not match its manifest, or the model; names the file."""


# Writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes tensors that are on the CPU, through to the disk; returns the file's size and hash as
    the manifest has them. Raises OSError."""
    # The widest first, as safetensors itself does: readers may want each where its width divides.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    digest = hashlib.sha256()
    hashing: deque[Future[None]] = deque()
    with path.open("wb", buffering=0) as file:
        with ThreadPoolExecutor(1) as beside:
            for piece in chain([_header(ordered)], _pieces(tensor for _, tensor in ordered)):
                if len(hashing) == _AHEAD:
                    hashing.popleft().result()
                hashing.append(beside.submit(digest.update, piece))
                append(file, piece)
            to_disk(file)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _header(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Iterable[Tensor]) -> Iterator[bytearray | memoryview]:
    """Their bytes, one tensor after the other: small ones together, large ones in parts."""
    together = bytearray()
    for tensor in tensors:
        data = _bytes_of(tensor)
        if len(data) < _CHUNK:
            together += data
        if len(data) >= _CHUNK or len(together) >= _CHUNK:
            yield together
            together = bytearray()
        if len(data) >= _CHUNK:
            yield from (data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK))
    yield together


def _bytes_of(tensor: Tensor) -> memoryview:
    other = _NOT_NUMPYS.get(tensor.dtype)
    array = tensor.numpy() if other is None else tensor.view(other).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def write_synced(path: Path, text: str) -> None:
    """Writes a file through to the disk."""
    with path.open("wb", buffering=0) as file:
        append(file, text.encode())
        to_disk(file)


def append(file: FileIO, data: bytes | bytearray | memoryview) -> None:
    """Writes all of `data`, or raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def to_disk(file: FileIO) -> None:
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


class _File(BaseModel):
    model_config = ConfigDict(strict=True)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Optimizer(BaseModel):
    model_config = ConfigDict(strict=True)
    state: dict[str, bool | int | float | str | None]
    groups: list[dict[str, Any]]


class _Manifest(BaseModel):
    """What is relied on of a manifest; whoever saves adds facts."""

    model_config = ConfigDict(strict=True)
    step: int
    files: dict[Annotated[str, Field(pattern=r"^[a-z]+\.safetensors$")], _File]
    optimizer: _Optimizer


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in the folder `path`. Raises DamagedCheckpoint where it is not
    one, and says why."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > _MANIFEST_BYTES:
            raise ValueError("too large")
        manifest = json.loads(file.read_bytes())
        form = manifest.get("format") if isinstance(manifest, dict) else None
        if form == FORMAT:
            _check_manifest(manifest, path)
    except (OSError, ValueError, RecursionError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else error
        raise DamagedCheckpoint(f"{file} is missing or unreadable ({reason})") from None
    if form != FORMAT:
        raise DamagedCheckpoint(f"{file} has format {form}, expected {FORMAT}")
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    checked = _Manifest.model_validate(manifest)
    if missing := sorted(set(_NEEDED) - checked.files.keys()):
        raise ValueError(f"it does not list {missing[0]}")
    if path.name != named(checked.step):
        raise ValueError(f"it is of step {checked.step}")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def named(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def verify(path: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest of the checkpoint in the folder `path`, whose files have the sizes and hashes
    that it lists; else DamagedCheckpoint. Without `hashes` only the sizes are looked at."""
    manifest = read_manifest(path)
    for name, listed in sorted(manifest["files"].items()):
        _check_file(path / name, listed, hashes=hashes)
    return manifest


def _check_file(file: Path, listed: dict[str, Any], *, hashes: bool) -> None:
    if not file.is_file():
        raise DamagedCheckpoint(f"{file} is missing")
    try:
        same = file.stat().st_size == listed["bytes"]
        if same and hashes:
            with file.open("rb") as stream:
                same = hashlib.file_digest(stream, "sha256").hexdigest() == listed["sha256"]
    except OSError as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error})") from None
    if not same:
        raise DamagedCheckpoint(f"{file} is damaged: size or hash differ from the manifest")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that was verified, on the CPU. Raises DamagedCheckpoint."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read ({error})") from None
