"""Optimizers, their parameter groups, and the learning rate as a function of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from train.config import OptimConfig, PartConfig
from train.packages import require_optimizer

Groups = list[dict[str, Any]]


def groups(parts: Mapping[str, Iterable[tuple[str, nn.Parameter]]], config: OptimConfig) -> Groups:
    """Parameter groups of what trains.

    parts: named parameters by part: "unet", "text_encoder", "tokens"; those that are frozen are
    left out. Each group has "params", its "part", "lr" (the part's peak rate) and "weight_decay";
    where optim.decay=matrices, biases, norms and DoRA's magnitudes are in a group that does not
    decay.
    """
    found: Groups = []
    for part, named in parts.items():
        own = _own(part, config)
        rate = config.learning_rate if own.learning_rate is None else own.learning_rate
        weight_decay = config.weight_decay if own.weight_decay is None else own.weight_decay
        by_decay: dict[float, list[nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                decays = config.decay == "all" or _is_matrix(name, parameter)
                by_decay.setdefault(weight_decay if decays else 0.0, []).append(parameter)
        found += [
            {"params": parameters, "part": part, "lr": rate, "weight_decay": decay}
            for decay, parameters in by_decay.items()
        ]
    return found


def parts_of(pipeline: Any) -> dict[str, Iterable[tuple[str, nn.Parameter]]]:
    """All parameters of the UNet and of the text encoder, for `groups`."""
    return {name: getattr(pipeline, name).named_parameters() for name in ("unet", "text_encoder")}


def _own(part: str, config: OptimConfig) -> PartConfig:
    own = {
        "unet": PartConfig(),
        "text_encoder": config.text_encoder,
        "tokens": config.tokens,
    }
    return own[part]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    # PEFT keeps the magnitudes of a convolution's filters as (1, filters, 1, 1).
    return parameter.dim() >= 2 and "lora_magnitude_vector" not in name


def build(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over a method's parameter groups. Raises UserError if its package is
    missing."""
    require_optimizer(config.name)
    usual = {
        "part": "unet",
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    complete = [usual | group for group in groups]
    for group in complete:
        group["initial_lr"] = group["lr"]
    optimizers = {
        "adamw": _adamw,
        "adamw8bit": _adamw8bit,
        "adafactor": _adafactor,
        "prodigy": _prodigy,
        "schedule_free": _schedule_free,
    }
    return optimizers[config.name](complete, config)


def _adam_settings(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    fused = _can_be_fused(parameter for group in groups for parameter in group["params"])
    return torch.optim.AdamW(
        groups, **_adam_settings(config), weight_decay=config.weight_decay, fused=fused or None
    )


def _can_be_fused(parameters: Iterable[nn.Parameter]) -> bool:
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    supported = _get_fused_kernels_supported_devices()
    return all(p.is_floating_point() and p.device.type in supported for p in parameters)


def _adamw8bit(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **_adam_settings(config), weight_decay=config.weight_decay)


def _adafactor(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018) at a rate given from outside, without a first moment.

    transformers', because torch's always multiplies the rate by the root mean square of each tensor
    (section 8 of the paper), at least 1e-3: a LoRA's second factor, which starts at zero, would
    hardly move at a rate that suits Adam.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def _prodigy(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko and Defazio 2023). Adam's bias correction, and a distance that is not
    estimated from the small steps of a warmup, are what its authors recommend for diffusion."""
    from prodigyopt import Prodigy

    # Each group has its weight decay: Prodigy prints a line where the common one is not 0.
    return Prodigy(
        groups,
        **_adam_settings(config),
        weight_decay=0.0,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def _schedule_free(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024). It weighs each iterate in its average by the
    square of the highest rate so far, so the rate of our own warmup counts as its own would."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(
        groups, **_adam_settings(config), weight_decay=config.weight_decay, warmup_steps=0
    )


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
    """Sets each group's learning rate to its own peak times `rate_factor`, so that every part falls
    to the same share of its peak."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, steps: int, config: OptimConfig
    ) -> None:
        self._optimizer, self._steps, self._config = optimizer, steps, config

    def apply(self, step: int) -> dict[str, float]:
        """Sets the rates for `step`; returns them by part, the first group's first. Prodigy's are
        what it has found by now times the group's rate."""
        factor = rate_factor(step, steps=self._steps, config=self._config)
        rates: dict[str, float] = {}
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            rates.setdefault(group["part"], float(group["lr"] * group.get("d", 1.0)))
        return rates
