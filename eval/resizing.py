"""From a picture to what a network reads; how it is resized is part of every metric.

The whole picture is squashed to the network's square. `clean`: PIL's bicubic filter on floats,
antialiased and not requantised (Parmar et al., 2022, arXiv:2104.11222). `legacy_tf`: as the first
FIDs were computed (Heusel et al., 2017, arXiv:1706.08500), by the bilinear resize of TensorFlow 1,
which skips pixels where a picture is made smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Mode = Literal["clean", "legacy_tf"]
FILTERS = {"clean": "clean bicubic", "legacy_tf": "legacy_tf bilinear"}


@dataclass(frozen=True)
class Input:
    """What a network reads: `side` x `side` pixels, as (level - mean) / std of levels 0 to 255."""

    side: int
    mode: Mode
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return f"{FILTERS[self.mode]}, squashed to {self.side}x{self.side}"

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) to float32 (3, side, side)."""
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, pixels.shape
        levels = resize(pixels, self.side, mode=self.mode)
        scaled = (levels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def resize(pixels: np.ndarray, side: int, *, mode: Mode) -> np.ndarray:
    """uint8 (H, W, 3) to float32 (side, side, 3) in [0, 255]."""
    return clean(pixels, side) if mode == "clean" else legacy_tf(pixels, side)


def clean(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) to float32 (side, side, 3) in [0, 255], antialiased."""
    from PIL import Image

    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = [channel.resize((side, side), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1).clip(0, 255)


def legacy_tf(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) to float32 (side, side, 3) in [0, 255], between the four pixels about
    (row, column) * size / side: neither half-pixel centres nor aligned corners nor antialiasing,
    in float32 throughout."""
    height, width = pixels.shape[:2]
    top, bottom, down = _between(height, side)
    left, right, across = _between(width, side)
    levels, across = pixels.astype(np.float32), across[:, None]
    upper, lower = levels[top], levels[bottom]  # (side, W, 3)
    upper = upper[:, left] + (upper[:, right] - upper[:, left]) * across
    lower = lower[:, left] + (lower[:, right] - lower[:, left]) * across
    return upper + (lower - upper) * down[:, None, None]


def _between(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels before and after each of `side` places, and how far from the one to the other."""
    places = np.arange(side, dtype=np.float32) * np.float32(size / side)
    before = places.astype(np.int64).clip(max=size - 1)
    return before, (before + 1).clip(max=size - 1), places - before.astype(np.float32)
