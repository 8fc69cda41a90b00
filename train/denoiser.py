"""The module every method trains through: a batch in, one denoising loss per sample out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.diffusion import Objective
from train.models import text_encoder_output


class Denoiser(nn.Module):
    """UNet, objective and text encoder, any of them frozen.

    forward: batch with "latents" and "noise" (B, 4, h, w), "timestep" (B,), either "prompt_embeds"
    (B, 77 k, D) or "input_ids" (B, 77 k) of k windows, and perhaps "mask" (B, 1, h, w) -> losses
    (B,), fp32.
    """

    def __init__(self, unet: nn.Module, objective: Objective, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.objective, self.text_encoder = unet, objective, text_encoder

    def forward(self, batch: dict[str, Any]) -> Tensor:
        text = self._text(batch)

        def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy_latents, timesteps, encoder_hidden_states=text).sample

        return self.objective(
            predict,
            batch["latents"],
            batch["noise"],
            batch["timestep"],
            mask=batch.get("mask"),
        )

    def _text(self, batch: dict[str, Any]) -> Tensor:
        if "prompt_embeds" in batch:
            return batch["prompt_embeds"]
        return text_encoder_output(self.text_encoder, batch["input_ids"])
