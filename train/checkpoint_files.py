"""The files of a checkpoint: hashed while they are written, on the disk before they are named, and
checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from train.config import RunFailed

FORMAT = 2
# What files are hashed with, by format. It is to tell damage, not malice; SHA-256 takes five times
# as long, from cores that train.
_HASHES: dict[int, tuple[str, Callable[[], Any]]] = {
    1: ("sha256", hashlib.sha256),
    2: ("xxh3_128", xxhash.xxh3_128),
}
MANIFEST = "manifest.json"
_NEEDED = ("model.safetensors", "optimizer.safetensors")
CHUNK = 4 * 2**20  # bytes that are written, and meanwhile hashed, at a time
_AHEAD = 8  # pieces at most that are written but not hashed yet
_MANIFEST_BYTES = 64 * 2**20  # at most: a few numbers for each parameter


class DamagedCheckpoint(RunFailed):
    """A checkpoint whose files do not match its manifest, or the model; names the file."""


# Writing


Bytes = bytes | bytearray | memoryview


def write_pieces(path: Path, pieces: Iterable[Bytes]) -> dict[str, Any]:
    """Writes a file through to the disk; returns its size and hash as the manifest has them. Raises
    OSError."""
    name, new_hash = _HASHES[FORMAT]
    digest = new_hash()
    hashing: deque[Future[None]] = deque()
    with path.open("wb", buffering=0) as file:
        with ThreadPoolExecutor(1) as beside:
            for piece in pieces:
                if len(hashing) == _AHEAD:
                    hashing.popleft().result()
                if len(piece) < CHUNK and not hashing:
                    digest.update(piece)  # too little for a thread
                else:
                    hashing.append(beside.submit(digest.update, piece))
                append(file, piece)
            to_disk(file)
        return {"bytes": file.tell(), name: digest.hexdigest()}


def write_synced(path: Path, text: str) -> None:
    """Writes a file through to the disk."""
    with path.open("wb", buffering=0) as file:
        append(file, text.encode())
        to_disk(file)


def append(file: FileIO, data: Bytes) -> None:
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
    xxh3_128: str | None = Field(None, pattern="^[0-9a-f]{32}$")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")


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
        if form in _HASHES:
            _check_manifest(manifest, path)
    except (OSError, ValueError, RecursionError) as error:
        reason = _first(error) if isinstance(error, ValidationError) else error
        raise DamagedCheckpoint(f"{file} is missing or unreadable ({reason})") from None
    if form not in _HASHES:
        raise DamagedCheckpoint(f"{file} has format {form}, expected one up to {FORMAT}")
    return manifest


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    checked = _Manifest.model_validate(manifest)
    if missing := sorted(set(_NEEDED) - checked.files.keys()):
        raise ValueError(f"it does not list {missing[0]}")
    hashed = _HASHES[manifest["format"]][0]
    if bare := [name for name, file in checked.files.items() if getattr(file, hashed) is None]:
        raise ValueError(f"it has no {hashed} of {bare[0]}")
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
        _check_file(path / name, listed, manifest["format"], hashes=hashes)
    return manifest


def _check_file(file: Path, listed: dict[str, Any], form: int, *, hashes: bool) -> None:
    if not file.is_file():
        raise DamagedCheckpoint(f"{file} is missing")
    try:
        same = file.stat().st_size == listed["bytes"]
        if same and hashes:
            name, new_hash = _HASHES[form]
            with file.open("rb") as stream:
                same = hashlib.file_digest(stream, new_hash).hexdigest() == listed[name]
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
