"""How much of a known GPU's arithmetic a run uses: `mfu` in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from train import flops
from train.architecture import Architecture
from train.config import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_SIDES = (256, 384, 512)  # in pixels: three sizes tell how the work grows

Work = Callable[[Iterable[dict[str, Any]]], float]
"""Micro-batches -> the seconds that they would take this device at its peak rate; 0 where that is
not known. Model FLOPs: what checkpointing computes again is not among them."""


def unknown(micro_batches: Iterable[dict[str, Any]]) -> float:
    return 0.0


def work_of(config: RunConfig, accelerator: Accelerator) -> Work:
    """The work of a run's micro-batches on the device it has."""
    if accelerator.device.type != "cuda":
        return unknown
    import torch

    name, train = torch.cuda.get_device_name(accelerator.device), config.train
    peak = flops.peak_flops(name, train.mixed_precision, tf32=train.tf32)
    return unknown if peak is None else at_peak(config, peak)


def at_peak(config: RunConfig, peak: float) -> Work:
    """The same for a rate in FLOP/s. Counting takes seconds, so what is usual is counted at once,
    before training."""
    base, usual = Architecture.of(config.model), config.data.named_sources()[0].tokens // 75
    known = {usual: _growth(config, base, usual)}

    def seconds(micro_batches: Iterable[dict[str, Any]]) -> float:
        total = 0.0
        for batch in micro_batches:
            count, _, height, width = batch["latents"].shape
            text = batch["prompt_embeds"] if "prompt_embeds" in batch else batch["input_ids"]
            windows = text.shape[1] // flops.WINDOW
            if windows not in known:
                known[windows] = _growth(config, base, windows)
            total += count * float(np.polyval(known[windows], height * width))
        return total / peak

    return seconds


def _growth(config: RunConfig, base: Architecture, windows: int) -> np.ndarray:
    """The coefficients of FLOPs per picture by latent pixels: layers grow with them, self-attention
    with their square, and what reads the text alone does not."""
    pixels = [(side // flops.PIXELS) ** 2 for side in _SIDES]
    counted = [flops.count(base, (side, side), windows=windows) for side in _SIDES]
    work = [flops.per_picture(config, one).model for one in counted]
    return np.polyfit(pixels, work, 2)
