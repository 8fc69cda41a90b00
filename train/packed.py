"""The bytes of the safetensors file that tensors make. It holds the header's length (8 bytes,
little-endian), a header of JSON, and the tensors one after the other
(https://github.com/huggingface/safetensors#format); the same tensors give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.checkpoint_files import CHUNK, Bytes
from train.sharding import whole

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


class Packed:
    """Memory of the CPU for tensors of certain names, dtypes and shapes, which lie in it as in
    their file: copied in one call, written in one piece, and filled again for the next.

    tensors: views of it, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._form = _form(tensors)
        ordered = _in_order(tensors)
        head = _header(ordered)
        sizes = [_size(tensor) for _, tensor in ordered]
        memory = torch.empty(len(head) + sum(sizes), dtype=torch.uint8)
        self._head, self._bytes = len(head), memory.numpy().data
        self._bytes[: self._head] = head
        parts = memory[self._head :].split(sizes)
        views = {
            name: part.view(tensor.dtype).view(tensor.shape)
            for (name, tensor), part in zip(ordered, parts, strict=True)
        }
        self.tensors = {name: views[name] for name in tensors}
        widths = groupby(ordered, key=lambda item: item[1].dtype)
        numbers = [(dtype, sum(_size(tensor) for _, tensor in group)) for dtype, group in widths]
        stretches = memory[self._head :].split([size for _, size in numbers])
        self._stretches = [
            stretch.view(dtype) for (dtype, _), stretch in zip(numbers, stretches, strict=True)
        ]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        return self._form == _form(tensors)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors that fit, from wherever they are. Of sharded ones every process gives its
        share, of one after the other in their order."""
        places, values = list(self.tensors.values()), list(tensors.values())
        if any(isinstance(value, DTensor) for value in values):
            for place, value in zip(places, values, strict=True):
                place.copy_(whole(value))
        elif values:
            torch._foreach_copy_(places, values)

    def is_finite(self) -> bool:
        return _are_finite(self._stretches)

    def pieces(self) -> Iterator[Bytes]:
        """The file's bytes, in parts to be written and hashed."""
        yield self._bytes[: self._head]
        for at in range(self._head, len(self._bytes), CHUNK):
            yield self._bytes[at : at + CHUNK]


class Scattered:
    """Tensors that are written from where they are, if that is the CPU, and else from copies.

    tensors: those, by name. Of sharded ones every process gives its share, as for `Packed.fill`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {
            name: whole(tensor).to("cpu", memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }

    def is_finite(self) -> bool:
        return _are_finite(self.tensors.values())

    def pieces(self) -> Iterator[Bytes]:
        """As those of `Packed`."""
        ordered = _in_order(self.tensors)
        yield _header(ordered)
        yield from _pieces(tensor for _, tensor in ordered)


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    # Of finite numbers the norm is finite too, as a rule, and is found far quicker.
    return all(
        bool(torch.linalg.vector_norm(tensor).isfinite() or tensor.isfinite().all())
        for tensor in tensors
        if tensor.is_floating_point()
    )


def _form(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def _size(tensor: Tensor) -> int:
    """In bytes; of a sharded one, of all of it."""
    return tensor.numel() * tensor.element_size()


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """As they lie in a file: the widest first, as safetensors itself does, for readers may want
    each where its width divides."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def _header(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors:
        start, end = end, end + _size(tensor)
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Bytes]:
    """Their bytes, one tensor after the other: small ones together, large ones in parts."""
    together = bytearray()
    for tensor in tensors:
        data = _bytes_of(tensor)
        if len(data) < CHUNK:
            together += data
        if len(data) >= CHUNK or len(together) >= CHUNK:
            yield together
            together = bytearray()
        if len(data) >= CHUNK:
            yield from (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    yield together


def _bytes_of(tensor: Tensor) -> memoryview:
    other = _NOT_NUMPYS.get(tensor.dtype)
    array = tensor.numpy() if other is None else tensor.view(other).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
