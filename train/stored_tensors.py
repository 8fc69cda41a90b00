"""Tensors of safetensors files that are read one by one, and files of them written one by one: a
model of any size is converted in the memory of its largest tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data.files import whole
from train.config import UserError
from train.safetensors_file import read_header, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' name of a kind of numbers: PyTorch's, and the bytes of one.
_KINDS = {
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
}
_UNKNOWN = 64 * "0"  # stands for a sha256
_KOHYA_HASH = "sshs_model_hash"


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is asked for."""

    kind: str
    """Of its numbers, as safetensors calls it: "F32", "BF16"..."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _KINDS[self.kind][1]

    def changed(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Stored:
        """What `change` makes of it, of another shape."""
        return replace(self, shape=shape, read=lambda: change(self.read()))


def of_files(files: Iterable[Path]) -> dict[str, Stored]:
    """All tensors of a file or of a model's shards, by name. Raises UserError for a file that is
    not safetensors, and for numbers of an unusual kind (8 bits)."""
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    for file in files:
        entries = read_header(file).tensors
        handle: Any = safe_open(str(file), framework="pt")
        for name, entry in entries.items():
            if entry.dtype not in _KINDS:
                raise UserError(
                    f"{file}: {shown(name)} is stored as {entry.dtype}; give a model in fp32, "
                    "fp16 or bf16"
                )
            found[name] = Stored(entry.dtype, entry.shape, partial(handle.get_tensor, name))
    return found


def of_tensor(tensor: Tensor) -> Stored:
    """One that is there already."""
    return Stored(_kind(tensor.dtype), tuple(tensor.shape), lambda: tensor)


def cast(tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Stored]:
    """The same, floating-point numbers as `dtype`; None leaves them as they are.

    Reading raises UserError for a tensor that is not finite, or not in that precision.
    """
    return {name: _cast(name, stored, dtype) for name, stored in tensors.items()}


def _cast(name: str, stored: Stored, dtype: torch.dtype | None) -> Stored:
    if stored.kind.startswith("I"):
        return stored
    kind = stored.kind if dtype is None else _kind(dtype)

    def read() -> Tensor:
        tensor = stored.read()
        if not tensor.isfinite().all():
            raise UserError(f"{name} is not finite: its training had diverged; give another model")
        tensor = tensor.to(dtype or tensor.dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{name} does not fit into {_KINDS[kind][0]}; use bf16 or fp32")
        return tensor

    return Stored(kind, stored.shape, read)


def _kind(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return next(kind for kind, (known, _) in _KINDS.items() if known == name)


def write(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str], *, hashed: str = ""
) -> None:
    """Writes a safetensors file, whole or not at all, in the memory of the largest tensor.

    Equal tensors and metadata make equal bytes. hashed: an entry of the metadata that gets the
    sha256 of all that follows the header, as `0x...`. Beside kohya's entries (`ss_*`) stands
    kohya's own, which is the same without `0x`.
    """
    order = sorted(tensors, key=lambda name: (-_KINDS[tensors[name].kind][1], name))
    entries = {hashed: "0x"} if hashed else {}
    entries |= {_KOHYA_HASH: ""} if any(key.startswith("ss_") for key in metadata) else {}
    about = dict(metadata) | _hashes(entries, _UNKNOWN)
    ordered = {name: tensors[name] for name in order}
    with whole(path) as file:
        file.write(_header(ordered, about))
        digest = _write_tensors(file, ordered)
        if entries:
            file.seek(0)
            file.write(_header(ordered, about | _hashes(entries, digest)))


def _hashes(entries: Mapping[str, str], digest: str) -> dict[str, str]:
    """entries: how each begins."""
    return {key: f"{prefix}{digest}" for key, prefix in entries.items()}


def _header(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, stored in tensors.items():
        place = {"data_offsets": [at, at + stored.size]}
        content[name] = {"dtype": stored.kind, "shape": list(stored.shape), **place}
        at += stored.size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _write_tensors(file: IO[bytes], tensors: Mapping[str, Stored]) -> str:
    """Returns the sha256 of what it writes."""
    import torch

    digest = hashlib.sha256()
    for name, stored in tensors.items():
        tensor = stored.read()
        assert (_kind(tensor.dtype), tuple(tensor.shape)) == (stored.kind, stored.shape), name
        raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
        file.write(raw)
        digest.update(raw)
    return digest.hexdigest()
