"""What the base predicted before it was fine-tuned: the target that keeps a class as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train import adapters
from train.denoiser import text_of
from train.method import Pipeline
from train.models import dtype_of

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class FrozenBase:
    """The base's prediction for the input and the text of a batch, without a gradient."""

    unet: Any
    text_encoder: Any
    """For batches of token ids; where it is frozen, batches mostly hold its embeddings."""
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Within it these two are the base and nothing else."""

    @torch.no_grad()
    def __call__(self, inputs: Tensor, timesteps: Tensor, text: Batch) -> Tensor:
        """inputs (B, C, h, w), timesteps (B,) and what a batch says of the text, to what the base
        predicts, (B, 4, h, w)."""
        with self.alone():
            embeddings = text_of(text, self.text_encoder)
            return self.unet(inputs, timesteps, encoder_hidden_states=embeddings).sample


def without_adapters(pipeline: Pipeline) -> FrozenBase:
    """The base of a LoRA run, which is the model itself with its adapters switched off."""
    return FrozenBase(
        pipeline.unet, pipeline.text_encoder, alone=lambda: adapters.switched_off(pipeline)
    )


def copied(pipeline: Pipeline, *, text_encoder: bool, mixed_precision: str) -> FrozenBase:
    """A frozen copy of the UNet, to be made before it trains, and of the text encoder where that
    trains too, in the precision of the forward pass."""
    unet = _frozen(pipeline.unet, mixed_precision)
    text = _frozen(pipeline.text_encoder, mixed_precision) if text_encoder else None
    return FrozenBase(unet, text or pipeline.text_encoder)


def _frozen(module: Any, mixed_precision: str) -> Any:
    return copy.deepcopy(module).to(dtype_of(mixed_precision)).requires_grad_(False).eval()
