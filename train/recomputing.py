"""Activations that the backward pass computes again instead of finding them kept: which blocks do
so is a setting."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from train import base_layers
from train.adapters import fits
from train.config import ModelConfig, UserError

if TYPE_CHECKING:
    from train.method import Pipeline

_KEY = "train.gradient_checkpointing"


def enable(pipeline: Pipeline, wanted: bool | Sequence[str]) -> None:
    """Has the blocks of the UNet recompute: all, with the text encoder's layers wherever a gradient
    passes through them, or those that one of the patterns `wanted` fits.

    Of a block these are its resnets and the layers of its transformers, one at a time. Losses and
    gradients stay what they are, to the bit. Raises UserError for a pattern that fits none.
    """
    if not wanted:
        return
    unet = pipeline.unet
    unet.enable_gradient_checkpointing()
    if wanted is True:
        _enable_text(pipeline.text_encoder)
        return
    assert not isinstance(wanted, bool)
    blocks = {n: m for n, m in unet.named_modules() if hasattr(m, "gradient_checkpointing")}
    found = chosen(wanted, blocks)
    for name, block in blocks.items():
        block.gradient_checkpointing = name in found


def _enable_text(text_encoder: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    layers = [m for m in text_encoder.modules() if hasattr(m, "gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        # transformers recomputes in training mode alone. It is the layer's own: what has dropout
        # lies within it, and stays as it is.
        layer.training = True


def check(wanted: bool | Sequence[str], model: ModelConfig) -> None:
    """Raises UserError for a pattern that fits no block, as far as the base's configuration
    tells."""
    if isinstance(wanted, bool) or not wanted:
        return
    base = base_layers.of_base(model)
    if base is not None:
        chosen(wanted, blocks_of(base["unet"]))


def blocks_of(layers: Iterable[str]) -> list[str]:
    """The blocks that can recompute, of a UNet's layers by name: `down_blocks.0`, and within it the
    transformers, `down_blocks.0.attentions.0`."""
    found = dict[str, None]()
    for layer in layers:
        parts = layer.split(".")
        length = 1 if parts[0] == "mid_block" else 2
        found[".".join(parts[:length])] = None
        if parts[length] == "attentions":
            found[".".join(parts[: length + 2])] = None
    return list(found)


def chosen(patterns: Sequence[str], blocks: Collection[str]) -> set[str]:
    """The blocks that one of the patterns fits. Raises UserError for a pattern that fits none."""
    for pattern in patterns:
        if not any(fits(pattern, block) for block in blocks):
            raise UserError(
                f"{_KEY}: {pattern!r} fits no block of this UNet: use "
                f"{', '.join(sorted(block for block in blocks if '.attentions' not in block))}, or "
                "the transformers within one, like mid_block.attentions"
            )
    return {block for block in blocks if any(fits(pattern, block) for pattern in patterns)}
