"""What a run will take, about, for its first screen; scripts/plan.py says it in full.

The time is that of the UNet's arithmetic at a share of the device's rate; on a CPU both are found
in a moment, without importing anything heavy. A run of a minute or more is also told its memory, by
a rehearsal that takes seconds (train/footprint.py).
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections import Counter
from math import prod
from typing import Literal

import numpy as np

from train import base_layers, flops, screens
from train.config import RunConfig
from train.pictures import Pictures

SHARE = 0.35
"""Of a device's peak rate that training is taken to reach, as in scripts/plan.py; an assumption."""
_WORTH_REHEARSING = 60.0  # seconds of training
_ACCURACY = 2  # digits: more would be a promise
_SIDE, _ROUNDS = 512, 12  # of the product that a CPU is measured with
_PIXELS = 8  # that a latent is wide


def of(config: RunConfig, found: Pictures) -> list[str]:
    """A line, or none where nothing can be told: a base of unusual blocks, a card that is not
    known, pictures still to be streamed."""
    if not len(found.sizes):
        return []
    card = gpu_name()
    said = _on_cpu(config, found) if card is None else _on_gpu(config, found, card)
    return [said] if said else []


def gpu_name() -> str | None:
    """The first card that this process would use, by its name; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return None
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def _on_cpu(config: RunConfig, found: Pictures) -> str | None:
    layers = base_layers.of_base(config.model)
    if layers is None:
        return None
    forward = unet_flops(layers["unet"], mean_size(found))
    work = flops.Work(forward, 0.0, 0.0, 0.0)  # the text encoder's share is small
    seconds = _training_seconds(config, work, cpu_rate() * SHARE)
    parts = [f"{screens.duration(rounded(seconds))} of training", *_memory(config, found, seconds)]
    return f"about {' and '.join(parts)} on this CPU"


def _on_gpu(config: RunConfig, found: Pictures, card: str) -> str | None:
    from train.architecture import Architecture

    train, parts, seconds = config.train, [], math.inf
    peak = flops.peak_flops(card, train.mixed_precision, tf32=train.tf32)
    if peak is not None:
        base = Architecture.of(config.model)
        work = flops.count(base, mean_size(found), windows=flops.windows(config))
        seconds = _training_seconds(config, work, peak * SHARE * processes())
        parts.append(f"{screens.duration(rounded(seconds))} of training")
    parts += _memory(config, found, seconds, device="cuda")
    return f"about {' and '.join(parts)} on {card}" if parts else None


def _memory(
    config: RunConfig, found: Pictures, seconds: float, *, device: Literal["cpu", "cuda"] = "cpu"
) -> list[str]:
    """What a run of so many seconds is expected to hold; nothing where that cannot be told."""
    from train.architecture import Architecture
    from train.footprint import predict

    if seconds < _WORTH_REHEARSING:
        return []
    try:
        with screens.working("foreseeing its memory"):
            base = Architecture.of(config.model)
            size, many = largest(found), processes()
            footprint = predict(config, base, size=size, device=device, processes=many)
    except Exception:  # it is only told: no run shall end for it
        return []
    return [f"{footprint.peak.bytes / 2**30:.1f} GiB of memory at most"]


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _training_seconds(config: RunConfig, work: flops.Work, rate: float) -> float:
    picture = flops.per_picture(config, work)
    steps = config.train.steps * config.train.batch_size
    return steps * (picture.model + picture.again) / rate


def mean_size(found: Pictures) -> tuple[int, int]:
    """A square of the pictures' mean area, its side a multiple of 64 pixels' latents."""
    side = float(np.sqrt(found.sizes.astype(np.int64).prod(axis=1).mean()))
    return (max(round(side / 64), 1) * 64,) * 2


def largest(found: Pictures) -> tuple[int, int]:
    """The bucket of the largest area."""
    counts = Counter(map(tuple, found.sizes.tolist()))
    width, height = max(counts, key=lambda size: size[0] * size[1])
    return width, height


def unet_flops(layers: base_layers.Layers, size: tuple[int, int]) -> float:
    """FLOPs of a forward pass for one picture of (width, height) pixels: two for each weight at
    each place where it acts, and the products of attention."""
    width, height = size[0] // _PIXELS, size[1] // _PIXELS
    levels = 1 + max(_number(name) for name in layers if name.startswith("down_blocks."))
    total = 0.0
    for name, shape in layers.items():
        places = width * height / 4 ** _level(name, levels)
        reads_text = name.endswith(("attn2.to_k", "attn2.to_v"))
        total += 2 * prod(shape) * (flops.WINDOW if reads_text else places)
        if name.endswith(".to_q"):
            others = flops.WINDOW if ".attn2." in name else places
            total += 4 * places * others * shape[0]
    return total


def _level(name: str, levels: int) -> int:
    """How often the sides were halved before a layer."""
    if name.startswith("mid_block."):
        return levels - 1
    number = _number(name)
    return number if name.startswith("down_blocks.") else levels - 1 - number


def _number(name: str) -> int:
    return int(name.split(".")[1])


def cpu_rate() -> float:
    """FLOP/s of a product of matrices in fp32, the best of a few, on the threads that training will
    have."""
    factor = np.ones((_SIDE, _SIDE), np.float32)
    best = 0.0
    for _ in range(_ROUNDS):
        before = time.perf_counter()
        factor @ factor
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - before))
    return best


def rounded(seconds: float) -> float:
    """To as many digits as can be meant."""
    return float(f"{seconds:.{_ACCURACY - 1}e}")
