"""Photographs that are made up, for what has to read such files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

GRAIN = 5.0  # standard deviation of a photograph's finest noise, of 255


def photograph(number: int, size: tuple[int, int], *, rotated: bool) -> bytes:
    """A JPEG with a photograph's spectrum (noise at every scale, the coarse strongest), its grain,
    and at 12 megapixels its 3 to 4 MiB. `rotated`: to be turned when it is shown."""
    random = np.random.default_rng(number)
    width, height = size
    pixels = 128 + GRAIN * random.standard_normal((height, width, 1), np.float32)
    for level in range(2, 11):
        small = random.normal(128, 30 * 2 ** (-level / 3), (2**level * 3 // 4, 2**level, 3))
        octave = Image.fromarray(small.clip(0, 255).astype(np.uint8))
        large = octave.resize((width, height), Image.Resampling.BILINEAR)
        pixels = pixels + np.asarray(large, np.float32) - 128
    exif = Image.Exif()
    exif[0x0112] = 6 if rotated else 1
    file = io.BytesIO()
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture.save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()
