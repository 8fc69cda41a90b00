"""Optimizers, and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch

from train.config import OptimConfig, UserError


def build(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over a method's parameter groups. Raises UserError if its package is
    missing."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "optim.name=adamw8bit needs bitsandbytes: pip install bitsandbytes, or use "
            "optim.name=adamw"
        ) from None
    return AdamW8bit(groups, **settings)


def rate_factor(step: int, *, steps: int, config: OptimConfig) -> float:
    """Learning rate at optimizer step `step` (from 0) as a share of the peak.

    Linear warmup from 1/(warmup+1) over `warmup_steps`, then constant, linear or cosine to the
    floor, which the last step reaches. A function of the step alone: the same on any number of
    processes and after a resume.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    floor = config.final_learning_rate / config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return floor + (1 - floor) * remaining


class Schedule:
    """Sets each group's learning rate to its own peak times `rate_factor`."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, steps: int, config: OptimConfig
    ) -> None:
        self._optimizer, self._steps, self._config = optimizer, steps, config
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def apply(self, step: int) -> float:
        """Sets the rates for `step`; returns the first group's."""
        factor = rate_factor(step, steps=self._steps, config=self._config)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return float(self._optimizer.param_groups[0]["lr"])
