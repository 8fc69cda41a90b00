"""A loader of kohya's format written from its description alone: nothing of this project's, of
diffusers' or of safetensors' is in it.

A safetensors file is 8 bytes with the length of its header, the header as JSON with each tensor's
dtype, shape and place, and the tensors. A layer has `NAME.lora_down.weight`, `NAME.lora_up.weight`
and a scalar `NAME.alpha`; what it adds to its weight is alpha / rank x up x down, where a
convolution's down is [rank, in, k, k] and its up [out, rank, 1, 1].
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

_KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors in fp64, and the metadata."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, about in header.items():
        first, last = about["data_offsets"]
        values = np.frombuffer(content[start + first : start + last], _KINDS[about["dtype"]])
        if about["dtype"] == "BF16":  # the upper half of an fp32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values.reshape(about["shape"]).astype(np.float64)
    return tensors, metadata


def deltas(file: Path) -> dict[str, np.ndarray]:
    """What each layer adds to its weight, in the weight's shape, by its name."""
    tensors, _ = read(file)
    names = {name.partition(".")[0] for name in tensors}
    found = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        alpha = tensors[f"{name}.alpha"]
        assert alpha.shape == ()
        rank, outputs = len(down), len(up)
        assert up.shape[:2] == (outputs, rank) and up.ndim == down.ndim
        scale = float(alpha) / rank
        product = scale * up.reshape(outputs, rank) @ down.reshape(rank, -1)
        found[name] = product.reshape(outputs, *down.shape[1:])
    return found


def model_hash(file: Path) -> str:
    """sha256 of the bytes after the header."""
    content = file.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
