"""What a run will take, about, for its first screen; scripts/plan.py says it in full.

The time is that of the UNet's arithmetic at a share of the device's rate; both are found in a
moment, without importing anything heavy. A run of a minute or more is also told its memory, once,
before it begins: by a rehearsal that takes seconds (train/footprint.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Literal

import numpy as np

from train import base_layers, flops, rundir, screens
from train.config import RunConfig
from train.pictures import Pictures

SHARE = 0.35
"""Of a device's peak rate that training is taken to reach, as in scripts/plan.py; an assumption."""
_WORTH_TELLING = 5.0  # seconds of training
_WORTH_REHEARSING = 60.0  # seconds of training
_ACCURACY = 2  # digits: more would be a promise
_SIDE, _ROUNDS = 512, 12  # of the product that a CPU is measured with
_PIXELS = 8  # that a latent is wide


def of(config: RunConfig, found: Pictures) -> list[str]:
    """A line, or none where nothing can be told: a base of unusual blocks, a card that is not
    known, pictures still to be streamed; nor for what is over at once."""
    if not len(found.sizes):
        return []
    card, parts = gpu_name(), []
    # It is only told: no run shall end for it.
    with suppress(Exception), screens.working("foreseeing its time and memory"):
        for part in _parts(config, found, card):
            parts.append(part)
    return [f"about {' and '.join(parts)} on {card or 'this CPU'}"] if parts else []


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


def _parts(config: RunConfig, found: Pictures, card: str | None) -> Iterator[str]:
    """Of the time and of the memory, what can be told."""
    seconds = training_seconds(config, found, card)
    if seconds is not None and seconds >= _WORTH_TELLING:
        yield f"{screens.duration(rounded(seconds))} of training"
    is_long = card is not None if seconds is None else seconds >= _WORTH_REHEARSING
    if is_long and rundir.newest(config.output) is None:  # what is resumed has shown what it takes
        yield f"{_peak(config, found, card) / 2**30:.1f} GiB of memory at most"


def training_seconds(config: RunConfig, found: Pictures, card: str | None) -> float | None:
    """By the UNet's arithmetic: the text encoder's share is small. None where it cannot be told."""
    layers, train = base_layers.of_base(config.model), config.train
    if layers is None:
        return None
    rate: float | None = cpu_rate()
    if card is not None:
        rate = flops.peak_flops(card, train.mixed_precision, tf32=train.tf32)
    if rate is None:
        return None
    work = flops.Work(unet_flops(layers["unet"], mean_size(found)), 0.0, 0.0, 0.0)
    picture = flops.per_picture(config, work)
    # On a CPU the processes share what one would have.
    rate *= SHARE * (1 if card is None else processes())
    steps = max(train.steps - (rundir.newest(config.output) or 0), 0)
    return steps * train.batch_size * (picture.model + picture.again) / rate


def _peak(config: RunConfig, found: Pictures, card: str | None) -> int:
    """Bytes that the run holds at the most, rehearsed."""
    from train.architecture import Architecture
    from train.footprint import predict

    device: Literal["cpu", "cuda"] = "cpu" if card is None else "cuda"
    base, size = Architecture.of(config.model), largest(found)
    return predict(config, base, size=size, device=device, processes=processes()).peak.bytes


def processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
