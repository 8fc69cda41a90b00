"""The module every method trains through: a batch in, one denoising loss per sample out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train import resting
from train.diffusion import Objective
from train.models import text_encoder_output

Batch = dict[str, Any]
TEXT = ("prompt_embeds", "input_ids")  # of which a batch has one
Prior = Callable[[Tensor, Tensor, Batch], Tensor]
"""The frozen base: UNet input (B, C, h, w), timesteps (B,) and the text to its prediction."""


class Denoiser(nn.Module):
    """UNet, objective and text encoder, any of them frozen; without the text encoder where that
    rests (train/resting.py), as batches hold its embeddings then.

    forward: a batch of data/loader.py -> losses (B,), fp32. Samples that it marks as "prior" are to
    be predicted as `prior` predicts them.
    """

    def __init__(
        self,
        unet: nn.Module,
        objective: Objective,
        text_encoder: nn.Module,
        *,
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.objective = unet, objective
        # Where it rests on another device it is no part of what is moved, wrapped and kept alike.
        rests = resting.rests(text_encoder, beside=unet)
        self.text_encoder = None if rests else text_encoder
        self._prior = prior

    def forward(self, batch: Batch) -> Tensor:
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timestep"]
        input_noise = batch["input_noise"] if "input_noise" in batch else noise
        noisy_latents = self.objective.add_noise(latents, input_noise, timesteps)
        inputs = torch.cat([noisy_latents, *beside(batch)], dim=1)  # (B, 4 | 5 | 9, h, w)
        target = self.objective.target(latents, noise, timesteps)
        target = self._with_prior(target, inputs, timesteps, batch)
        text = text_of(batch, self.text_encoder)
        prediction = self.unet(inputs, timesteps, encoder_hidden_states=text).sample
        return self.objective.losses(prediction, target, timesteps, mask=batch.get("mask"))

    def _with_prior(
        self, target: Tensor, inputs: Tensor, timesteps: Tensor, batch: Batch
    ) -> Tensor:
        if "prior" not in batch:
            return target
        rows = batch["prior_rows"] if "prior_rows" in batch else batch["prior"].nonzero().flatten()
        if not len(rows):
            return target
        assert self._prior is not None
        text = {name: batch[name][rows] for name in TEXT if name in batch}
        prediction = self._prior(inputs[rows], timesteps[rows], text)
        return target.index_copy(0, rows, prediction.to(target))


def text_of(batch: Batch, text_encoder: nn.Module | None) -> Tensor:
    """The embeddings (B, 77 k, D) of a batch, of its token ids where it has none."""
    if "prompt_embeds" in batch:
        return batch["prompt_embeds"]
    return text_encoder_output(text_encoder, batch["input_ids"])


def beside(batch: Batch) -> list[Tensor]:
    """What a UNet of more than 4 channels sees beside the noisy latents: a depth map (B, 1, h, w),
    or the mask of what is to be painted and the latents of what stays (B, 1 + 4, h, w)."""
    names = ("depth", "inpaint_mask", "masked_latents")
    return [batch[name].float() for name in names if name in batch]
