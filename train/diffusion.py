"""The training objective: noisy latents, targets, and one weighted loss per sample.

Notation: `alpha_bar` is the cumulative product of 1 - beta (Ho et al. 2020, eq. 4),
alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) and SNR = alpha_bar / (1 - alpha_bar).
All arithmetic is in fp32, whatever the precision of the forward pass, and in float64 where the
tensors are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from train.config import DiffusionConfig

PredictionType = Literal["epsilon", "v_prediction", "sample"]
HuberSchedule = Literal["constant", "snr", "exponential"]
SNR_RANGE = (1e-3, 1e3)  # within which debiased weights follow the SNR


class Objective:
    """Denoising loss of one noise schedule and prediction type.

    alphas_cumprod: (T,) alpha_bar of every timestep, from the checkpoint's scheduler; rescaled to
    zero terminal SNR or not.
    min_snr_gamma: weight as if the error in x counted min(SNR, gamma) (Hang et al. 2023, section
    3.4). debiased: weight as if the error in epsilon counted 1 / sqrt(SNR) (Yu et al. 2023,
    arXiv:2310.08442). Neither: weight 1.
    huber_delta: pseudo-Huber in place of the squared error, turning from squared to linear there,
    in units of the target; at which timesteps, `huber_schedule` says.
    """

    # Not a module: what casts a module to bf16 would cast its schedule too, where sigma becomes 0.

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType,
        *,
        min_snr_gamma: float | None = None,
        debiased: bool = False,
        huber_delta: float | None = None,
        huber_schedule: HuberSchedule = "constant",
    ) -> None:
        assert min_snr_gamma is None or not debiased
        self._alphas_cumprod = alphas_cumprod.to(_precise(alphas_cumprod))
        self.prediction_type = prediction_type
        self.min_snr_gamma, self.debiased = min_snr_gamma, debiased
        self.huber_delta, self.huber_schedule = huber_delta, huber_schedule

    @classmethod
    def of(cls, scheduler: Any, config: DiffusionConfig) -> Objective:
        """The objective of a base's scheduler, which has the configuration's overrides already:
        its prediction type and schedule count."""
        assert scheduler.alphas_cumprod[-1] < 1e-6 or not config.zero_terminal_snr
        return cls(
            scheduler.alphas_cumprod,
            scheduler.config.prediction_type,
            min_snr_gamma=config.min_snr_gamma,
            debiased=config.debiased,
            huber_delta=config.huber_delta if config.loss == "huber" else None,
            huber_schedule=config.huber_schedule,
        )

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise (Ho et al. 2020, eq. 4); (B, C, h, w) of all, timesteps (B,)."""
        latents, noise = _together(latents, noise)
        alpha, sigma = self._alpha_sigma(timesteps, latents.dtype)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict, (B, C, h, w); v = alpha noise - sigma x (Salimans & Ho
        2022, appendix D)."""
        latents, noise = _together(latents, noise)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = self._alpha_sigma(timesteps, latents.dtype)
        return alpha * noise - sigma * latents

    def losses(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Weighted losses (B,) of predictions (B, C, h, w) at timesteps (B,).

        mask: (B, 1, h, w) from 0 to 1, how much each place counts. The loss is the mean over the
        mask's area, so that a small mask trains no slower; of an empty one it is 0.
        """
        prediction, target = _together(prediction, target)
        squared = (prediction - target).square()
        error = squared if self.huber_delta is None else self._huber(squared, timesteps)
        return _mean(error, mask) * self.weight(timesteps, error.dtype)

    def weight(self, timesteps: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Loss weight (B,) of samples at timesteps (B,).

        One weight, restated for the prediction type: at one timestep the error in epsilon is SNR
        times the squared error in x, and the error in v is SNR + 1 times that. So where an error in
        x counts w, one in epsilon counts w / SNR and one in v w / (SNR + 1). For min-SNR w is
        min(SNR, gamma); for debiased it is sqrt(SNR), as 1 / sqrt(SNR) on epsilon means.
        """
        if self.min_snr_gamma is not None:
            return self._min_snr_weight(self._snr(timesteps, dtype), self.min_snr_gamma)
        if self.debiased:
            return self._debiased_weight(self._snr(timesteps, dtype))
        return torch.ones_like(timesteps, dtype=dtype)

    def _min_snr_weight(self, snr: Tensor, gamma: float) -> Tensor:
        if self.prediction_type == "epsilon":
            # min(snr, g)/snr, whose limit at zero terminal SNR is 1 rather than 0/0.
            return (gamma / snr).clamp(max=1)
        clamped = snr.clamp(max=gamma)
        return clamped / (snr + 1) if self.prediction_type == "v_prediction" else clamped

    def _debiased_weight(self, snr: Tensor) -> Tensor:
        # At zero terminal SNR an epsilon model's would be infinite, and another's would leave the
        # last timestep untrained. kohya's limit at the other end is the same; its v weight, 1 /
        # (SNR + 1), and OneTrainer's, 1 / sqrt(SNR + 1), are other losses than their epsilon's.
        snr = snr.clamp(*SNR_RANGE)
        if self.prediction_type == "epsilon":
            return snr.rsqrt()
        return snr.sqrt() / (snr + 1) if self.prediction_type == "v_prediction" else snr.sqrt()

    def _huber(self, squared: Tensor, timesteps: Tensor) -> Tensor:
        """2 c (sqrt(d^2 + c^2) - c), which is d^2 where d is small, and 2 c |d| where it is large
        (Khrapov et al. 2024, arXiv:2403.16728, section 3, times 2 c)."""
        c = self._delta(timesteps, squared.dtype)[:, None, None, None]
        return 2 * c * squared / ((squared + c.square()).sqrt() + c)  # without the cancellation

    def _delta(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """huber_delta at each timestep, (B,).

        snr and exponential fall from 1 at the least noise, where details are learned, to
        huber_delta at the most, where what does not fit would weigh most; exponential as
        delta^(t / T), snr as (1 - delta) / (1 + sigma / alpha)^2 + delta.
        """
        assert self.huber_delta is not None
        delta = torch.full_like(timesteps, self.huber_delta, dtype=dtype)
        if self.huber_schedule == "constant":
            return delta
        if self.huber_schedule == "exponential":
            return delta ** (timesteps.to(dtype) / len(self._alphas_cumprod))
        alpha_bar = self._alpha_bar(timesteps, dtype)
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return (1 - delta) * (alpha / (alpha + sigma)).square() + delta

    def _alpha_sigma(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        alpha_bar = self._alpha_bar(timesteps, dtype)[:, None, None, None]  # (B, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _snr(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        alpha_bar = self._alpha_bar(timesteps, dtype)
        return alpha_bar / (1 - alpha_bar)

    def _alpha_bar(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        # Copied to the device once, at the first step: indexing from elsewhere would wait for it.
        self._alphas_cumprod = self._alphas_cumprod.to(timesteps.device)
        return self._alphas_cumprod[timesteps].to(dtype)


def _precise(*tensors: Tensor) -> torch.dtype:
    """float64 where any of them is, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _precise(first, second)
    return first.to(dtype), second.to(dtype)


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, C, h, w) over all but the first dimension, weighted by mask (B, 1, h, w)."""
    if mask is None:
        return error.flatten(1).mean(1)
    mask = mask.to(error)
    area = mask.flatten(1).mean(1)  # (B,)
    return (error * mask).flatten(1).mean(1) / area.clamp(min=torch.finfo(error.dtype).tiny)
