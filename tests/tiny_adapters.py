"""Adapters on the tiny models, as training would leave them."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_pipeline
from train import adapters
from train.config import LoraConfig


def trained(config: LoraConfig, seed: int = 1) -> Any:
    """A pipeline in training whose adapters have no zeros left in them."""
    pipeline = tiny_pipeline()
    adapters.attach(pipeline, config, seed=0)
    torch.manual_seed(seed)
    for part in adapters.named_parameters(pipeline).values():
        for name, parameter in part:
            if "magnitude" in name:
                parameter.data *= 1 + 0.5 * torch.rand_like(parameter)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
    return pipeline
