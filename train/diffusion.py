"""The training objective: noise, targets and weights, to one loss per sample. All arithmetic in
fp32.

Notation: `alpha_bar` is the cumulative product of 1 - beta (Ho et al. 2020, eq. 4) and
SNR(t) = alpha_bar / (1 - alpha_bar).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from train.config import DiffusionConfig

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Predict = Callable[[Tensor, Tensor], Tensor]


class Objective(nn.Module):
    """Denoising loss of one noise schedule and prediction type.

    alphas_cumprod: (T,) alpha_bar of every timestep, from the checkpoint's scheduler.
    min_snr_gamma: clamps the weight implied by the SNR (Hang et al. 2023, section 3.4); None for
    weight 1.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType,
        *,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.prediction_type = prediction_type
        self.min_snr_gamma = min_snr_gamma

    @classmethod
    def of(cls, scheduler: Any, config: DiffusionConfig) -> Objective:
        """The objective of a checkpoint's scheduler; its prediction type is the checkpoint's
        own."""
        return cls(
            scheduler.alphas_cumprod,
            scheduler.config.prediction_type,
            min_snr_gamma=config.min_snr_gamma,
        )

    def forward(
        self,
        predict: Predict,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Losses (B,) of `predict(noisy_latents, timesteps)`; latents and noise (B, C, h, w),
        timesteps (B,).

        mask: (B, 1, h, w) from 0 to 1, how much each place counts. The loss is the mean over the
        mask's area, so that a small mask trains no slower; of an empty one it is 0.
        """
        noisy_latents = self.add_noise(latents, noise, timesteps)
        prediction = predict(noisy_latents, timesteps).float()
        error = (prediction - self.target(latents, noise, timesteps)).square()
        return _mean(error, mask) * self.weight(timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, in fp32 (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha * latents.float() + sigma * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict; v = alpha noise - sigma x (Salimans & Ho 2022, appendix
        D)."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return latents.float()
        alpha, sigma = self._alpha_sigma(timesteps)
        return alpha * noise.float() - sigma * latents.float()

    def weight(self, timesteps: Tensor) -> Tensor:
        """Loss weight (B,): min(SNR, gamma) in units of the error in x, restated for the prediction
        type."""
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        alpha_bar = self.alphas_cumprod[timesteps]
        snr = alpha_bar / (1 - alpha_bar)
        clamped = snr.clamp(max=self.min_snr_gamma)
        if self.prediction_type == "epsilon":
            # min(snr, g)/snr, whose limit at zero terminal SNR is 1 rather than 0/0.
            return (self.min_snr_gamma / snr).clamp(max=1)
        return clamped / (snr + 1) if self.prediction_type == "v_prediction" else clamped

    def _alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]  # (B, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, C, h, w) over all but the first dimension, weighted by mask (B, 1, h, w)."""
    if mask is None:
        return error.flatten(1).mean(1)
    mask = mask.to(error)
    area = mask.flatten(1).mean(1)  # (B,)
    return (error * mask).flatten(1).mean(1) / area.clamp(min=torch.finfo(error.dtype).tiny)
