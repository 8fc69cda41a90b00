"""The module every method trains through: a batch in, one denoising loss per sample out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.diffusion import Objective
from train.models import text_encoder_output


class Denoiser(nn.Module):
    """UNet, objective and, where it trains too, the text encoder.

    forward: batch with "latents" and "noise" (B, 4, h, w), "timestep" (B,) and either
    "prompt_embeds" (B, 77, D) or "input_ids" (B, 77) -> losses (B,), fp32.
    """

    def __init__(
        self, unet: nn.Module, objective: Objective, text_encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.unet, self.objective, self.text_encoder = unet, objective, text_encoder

    def forward(self, batch: dict[str, Any]) -> Tensor:
        text = self._text(batch)

        def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            return self.unet(noisy_latents, timesteps, encoder_hidden_states=text).sample

        return self.objective(predict, batch["latents"], batch["noise"], batch["timestep"])

    def _text(self, batch: dict[str, Any]) -> Tensor:
        if self.text_encoder is not None:
            return text_encoder_output(self.text_encoder, batch["input_ids"])
        return batch["prompt_embeds"]
