"""Masks and depth maps, brought to the size of the latents that they go with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image

from data import images
from data.images import Size

if TYPE_CHECKING:
    import torch

BLACK = (0, 0, 0)
DOWN = 8  # pixels of a picture along one of its latent

Box = tuple[float, float, float, float]


def relative(box: Box, width: int, height: int) -> Box:
    """A box (left, top, right, bottom) in pixels as shares of the sides, from 0 to 1."""
    return (box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def mask_latent(content: bytes, size: Size, box: Box) -> torch.Tensor:
    """How much each latent of a picture at `size` counts: float16 (1, h/8, w/8), from 0 to 1.

    `content` is the file of a mask, upright as its picture; `box` what a crop keeps, from 0 to 1 of
    its sides. White counts, and what is transparent does not. Each latent gets the mean of the mask
    over its place. Raises as `images.open_image`.
    """
    small = _resize(
        open_mask(io.BytesIO(content), cover=size).convert("F"), size, box, Image.Resampling.BOX
    )
    return _tensor(small / 255)


def open_mask(file: Path | IO[bytes], *, cover: Size | None = None) -> Image.Image:
    """A mask, upright, in mode L; what is transparent is black. Raises as `images.open_image`."""
    return images.open_image(file, BLACK, cover=cover).convert("L")


def depth_latent(content: bytes, size: Size, box: Box) -> torch.Tensor:
    """Depth for the depth model: float16 (1, h/8, w/8), its least -1 and its greatest 1.

    `content` is the file of an 8- or 16-bit grey depth map, upright as its picture, near things
    bright; `box` as for a mask. Resized first and then scaled by its own extremes, as in diffusers'
    StableDiffusionDepth2ImgPipeline.prepare_depth_map; a map without any difference is zeros.
    Raises as `images.decode`.
    """
    small = _resize(open_depth(io.BytesIO(content)), size, box, Image.Resampling.BICUBIC)
    least, most = float(small.min()), float(small.max())
    if most <= least:
        return _tensor(np.zeros_like(small))
    return _tensor(2 * (small - least) / (most - least) - 1)


def open_depth(file: Path | IO[bytes]) -> Image.Image:
    """A depth map, upright, in mode F with all of its 8 or 16 bits. Raises as `images.decode`."""
    image = images.decode(file)
    turn = images.ORIENTATIONS.get(images.orientation(image))
    grey = image if image.mode.startswith("I") else image.convert("L")
    exact = Image.fromarray(np.asarray(grey, dtype=np.float32))
    return exact if turn is None else exact.transpose(turn)


def _resize(image: Image.Image, size: Size, box: Box, resample: Image.Resampling) -> np.ndarray:
    width, height = image.size
    pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    small = image.resize((size[0] // DOWN, size[1] // DOWN), resample, box=pixels)
    return np.asarray(small, dtype=np.float32)


def _tensor(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(values.astype(np.float16))[None]
