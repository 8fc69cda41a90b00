"""A linear layer's low-rank update added within one matrix product.

PEFT computes W x + (B (A x)) s in five operations on whole activations, and casts x to the
adapter's fp32 before autocast casts it back. Here the second product adds into what the first layer
gave, the scale within it, so that the update costs little more than its arithmetic. It is the same
sum, rounded otherwise, and serves training alone: pictures are made by PEFT's own, to the bit as
everyone else's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def fuse(model: nn.Module, adapter: str) -> None:
    """In place, of every linear layer whose only adapter is a plain LoRA of that name."""
    for layer in _linear(model):
        if list(layer.lora_A) == [adapter] and not layer.lora_variant:
            layer.forward = partial(_forward, layer, adapter)


def undo(model: nn.Module) -> None:
    """All layers are PEFT's own again."""
    for layer in _linear(model):
        vars(layer).pop("forward", None)


def _linear(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import Linear

    return [module for module in model.modules() if isinstance(module, Linear)]


def _forward(layer: Any, adapter: str, x: Tensor, *args: Any, **named: Any) -> Tensor:
    if not _fits(layer, adapter, x) or args or named:
        return type(layer).forward(layer, x, *args, **named)
    rows = x.flatten(0, -2)  # (..., inputs) to (n, inputs)
    result = layer.base_layer(rows)
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    kept = layer.lora_dropout[adapter](x).flatten(0, -2)
    low = functional.linear(kept, down)  # (n, rank)
    # In place: what a linear layer gave, it does not need again.
    result.addmm_(low.to(result.dtype), up.to(result.dtype).t(), alpha=layer.scaling[adapter])
    return result.unflatten(0, x.shape[:-1])


def _fits(layer: Any, adapter: str, x: Tensor) -> bool:
    in_use = not layer.disable_adapters and not layer.merged and layer.active_adapters == [adapter]
    same = torch.is_autocast_enabled(x.device.type) or x.dtype == layer.lora_A[adapter].weight.dtype
    return in_use and same and torch.is_grad_enabled()
