"""How far training has moved each block, as norms that are cheap enough to take at every pause.

- Of an adapter: the Frobenius norm of scale B A of each layer, by the trace identity
  |BA|^2 = tr((B'B)(AA')), so that nothing larger than rank x rank is made. DoRA's magnitudes are
  not in it.
- Of new words: the length of each embedding as it is used, beside the table's median length.
- Of whole weights: the norm of each trained parameter. The norm of its change would need the base
  beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Norms = dict[str, list[float]]
"""By block ("down_blocks.0", "mid_block", "text_encoder"), one of each of its layers."""

TABLE = "embeddings/median_of_the_table"
_NUMBERED = ("down_blocks", "up_blocks")


@torch.no_grad()
def of(model: nn.Module) -> Norms:
    """Of what trains in `model`; empty where a process has only a part of the weights. The device
    is read once."""
    found = list(_words(model)) + list(_adapters(model)) or list(_weights(model))
    if not found:
        return {}
    values = torch.stack([norm.float() for _, norm in found]).tolist()
    norms: Norms = {}
    for (name, _), value in zip(found, values, strict=True):
        norms.setdefault(name, []).append(value)
    return norms


def _adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    layers: Iterator[tuple[str, Any]] = model.named_modules()
    for name, layer in layers:
        for adapter, a in getattr(layer, "lora_A", {}).items():
            up, scale = layer.lora_B[adapter].weight, layer.scaling[adapter]
            yield block_of(name), product_norm(up, a.weight, scale)


def product_norm(up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The Frobenius norm () of scale x up x down: (outputs, r) and (r, inputs), convolutions
    flattened."""
    up, down = up.flatten(1).float(), down.flatten(1).float()
    square = ((up.T @ up) * (down @ down.T)).sum()  # of symmetric (r, r), the trace of the product
    return abs(scale) * square.clamp_min(0).sqrt()


def _words(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "rows") and hasattr(module, "values"):  # train/embeddings.py
            lengths = module.values().float().norm(dim=1)
            yield from ((f"embeddings/new_{n}", length) for n, length in enumerate(lengths, 1))
            yield TABLE, module.weight.float().norm(dim=1).median()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if any(hasattr(p, "full_tensor") or not p.numel() for _, p in trained):
        return  # in parts: the rest is on other processes
    norms = torch._foreach_norm([p.detach() for _, p in trained]) if trained else []
    for (name, _), norm in zip(trained, norms, strict=True):
        yield block_of(name), norm


def block_of(name: str) -> str:
    """The block that a module or parameter of a `Denoiser` lies in."""
    part, _, rest = name.removeprefix("module.").partition(".")
    if part != "unet":
        return part
    first, _, rest = rest.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in _NUMBERED else first
