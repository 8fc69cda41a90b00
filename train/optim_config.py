"""The optim and diffusion sections of a configuration: what is minimised, and how.

Imports nothing of this project but the reading of a configuration (train/parsing.py).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from train.parsing import Section


class PartConfig(Section):
    """What differs for one part of what trains."""

    learning_rate: float | None = Field(None, gt=0)
    """Its own peak learning rate; default optim.learning_rate."""
    weight_decay: float | None = Field(None, ge=0)
    """Its own weight decay; default optim.weight_decay."""


class TokensPartConfig(PartConfig):
    """What differs for new tokens."""

    weight_decay: float | None = Field(0.0, ge=0)
    """Their own weight decay; null for optim.weight_decay."""


class OptimConfig(Section):
    name: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free"] = "adamw"
    """Optimizer: adamw8bit is bitsandbytes' and keeps its moments in 8 bits; adafactor keeps its
    second moment factored; prodigy finds the rate itself (learning_rate=1); schedule_free is
    AdamW that averages instead of decaying its rate (schedule: constant)."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate; with prodigy a factor of the rate it finds, 1 as a rule."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """Floor that the schedule decays to at the last step."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warmup."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warmup."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What weight decay acts on: matrices and convolutions only, or biases and norms too."""
    text_encoder: PartConfig = PartConfig()
    """The text encoder's own, where it trains."""
    tokens: TokensPartConfig = TokensPartConfig()
    """Textual inversion's new tokens' own."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""

    @model_validator(mode="after")
    def _fits_the_optimizer(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must be from 0 to below 1")
        if self.name == "schedule_free":
            self._check_schedule_free()
        if self.name == "prodigy":
            self._check_prodigy()
        return self

    def _check_schedule_free(self) -> None:
        if self.schedule != "constant":
            raise ValueError(
                f"optim.schedule={self.schedule}: optim.name=schedule_free averages instead of "
                "decaying its rate; set optim.schedule=constant"
            )
        if self.betas[0] == 0:
            raise ValueError("optim.betas: optim.name=schedule_free needs a first one above 0")

    def _check_prodigy(self) -> None:
        if self.learning_rate < 0.1:
            raise ValueError(
                f"optim.learning_rate={self.learning_rate:g}: optim.name=prodigy finds the rate "
                "itself and multiplies it by this; set optim.learning_rate=1"
            )
        for part in ("text_encoder", "tokens"):
            rate = getattr(self, part).learning_rate
            if rate not in (None, self.learning_rate):
                raise ValueError(
                    f"optim.{part}.learning_rate={rate:g}: optim.name=prodigy has one rate for "
                    "all; leave it out, or choose another optim.name"
                )


class DiffusionConfig(Section):
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet predicts. Default: what the checkpoint's scheduler says; rarely right to
    override."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR loss weighting (Hang et al. 2023, 5 is usual); off by default."""
    debiased: bool = False
    """Weight the error in epsilon by 1 / sqrt(SNR) (Yu et al. 2023)."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2023); reaches the
    exported scheduler."""
    loss: Literal["mse", "huber"] = "mse"
    """Error measure: squared, or pseudo-Huber, which forgives what does not fit."""
    huber_delta: float = Field(0.1, gt=0)
    """Where pseudo-Huber turns from squared to linear, in units of the target."""
    huber_schedule: Literal["constant", "snr", "exponential"] = "snr"
    """How huber_delta depends on the timestep (Khrapov et al. 2024)."""
    noise_offset: float = Field(0.0, ge=0)
    """Share of noise that is constant over each channel, so that very dark and very bright
    pictures can be learned; 0.05 to 0.1 is usual."""
    input_perturbation: float = Field(0.0, ge=0)
    """Extra noise in the input that the target does not have (Ning et al. 2023); 0.1 is usual."""
    timesteps: Literal["uniform", "stratified", "logit_normal"] = "uniform"
    """How timesteps are drawn: each by itself, one from each of as many equal parts as the global
    batch has samples (less noise in the loss), or mostly from the middle (Esser et al. 2024)."""
    min_timestep: int = Field(0, ge=0)
    """Lowest timestep that is trained."""
    max_timestep: int | None = Field(None, ge=0)
    """Highest timestep that is trained; default: the schedule's last."""
    logit_mean: float = 0.0
    """logit_normal: above 0 towards noise, below 0 towards the picture."""
    logit_scale: float = Field(1.0, gt=0)
    """logit_normal: width."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.debiased and self.min_snr_gamma is not None:
            raise ValueError("diffusion.debiased and diffusion.min_snr_gamma: choose one of them")
        if self.max_timestep is not None and self.max_timestep < self.min_timestep:
            raise ValueError(
                f"diffusion.max_timestep={self.max_timestep} must not be below "
                f"diffusion.min_timestep={self.min_timestep}"
            )
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "diffusion.zero_terminal_snr: at zero SNR the noise tells nothing of the picture, "
                "so a model that predicts epsilon cannot be trained there"
            )
        return self
