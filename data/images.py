"""One picture: any readable file to upright sRGB, and sRGB to the size of its bucket."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageCms

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]  # (width, height) in pixels
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
# Named, because Pillow would otherwise try every decoder it has, with Ghostscript among them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Not "I" and "F", whose range no one knows, nor "LAB" and "HSV".
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
MODES |= {"I;16", "I;16L", "I;16B", "I;16N"}
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Fit(NamedTuple):
    """How a picture covers a size: `box` (left, top, right, bottom, in its pixels) is kept."""

    scale: float
    box: tuple[float, float, float, float]
    cropped: float  # share of the picture's pixels outside the box, from 0 to 1


def open_image(
    file: Path | IO[bytes], background: Colour = WHITE, *, cover: Size | None = None
) -> Image.Image:
    """The picture as upright 8-bit sRGB (mode RGB).

    EXIF orientation is applied, an ICC profile that can be read is converted to sRGB, transparency
    is laid over `background`, of an animation the first frame is taken, and 16-bit grey is scaled
    to 8. With `cover`, a big JPEG is decoded at a fraction of its size that still covers twice that
    (width, height), which is several times faster.

    Raises what Pillow raises for a damaged file, and ValueError for unusual kinds of pixels.
    """
    return _flatten(_upright(decode(file, cover=cover)), background)


def decode(file: Path | IO[bytes], *, cover: Size | None = None) -> Image.Image:
    """The first frame, decoded to the last pixel, in the mode of the file."""
    with Image.open(file, formats=FORMATS) as image:
        if cover is not None:
            width, height = 2 * cover[0], 2 * cover[1]
            sideways = orientation(image) >= 5
            image.draft(None, (height, width) if sideways else (width, height))
        image.load()
    if image.mode not in MODES:
        raise ValueError(f"pixels of kind {image.mode} are not understood: save it as 8-bit RGB")
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block raises nearly anything, and the pixels are still good
        return 1
    return value if value in ORIENTATIONS else 1


def upright_size(image: Image.Image) -> Size:
    """The (width, height) of a decoded picture once its orientation is applied."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def fit_geometry(width: int, height: int, size: Size) -> Fit:
    """How a picture of width x height is scaled to cover `size`, and what a centre crop keeps."""
    scale = max(size[0] / width, size[1] / height)
    kept_width, kept_height = min(size[0] / scale, width), min(size[1] / scale, height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    box = (left, top, min(left + kept_width, width), min(top + kept_height, height))
    return Fit(scale, box, 1 - kept_width * kept_height / (width * height))


def fit(image: Image.Image, size: Size) -> np.ndarray:
    """The RGB picture scaled to cover `size`, cropped at the centre: uint8 (height, width, 3)."""
    box = fit_geometry(*image.size, size).box
    resized = image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(resized)


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (h, w, 3) to float32 (3, h, w) in [-1, 1]."""
    import torch

    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0


def _upright(image: Image.Image) -> Image.Image:
    transpose = ORIENTATIONS.get(orientation(image))
    return image if transpose is None else image.transpose(transpose)


def _flatten(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return _to_srgb(image, image.info.get("icc_profile"))
    layer = image.convert("RGBA")
    colours = _to_srgb(layer.convert("RGB"), image.info.get("icc_profile"))
    flat = Image.new("RGB", image.size, background)
    flat.paste(colours, mask=layer.getchannel("A"))
    return flat


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "P":
        image = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that is broken or for other channels: the pixels are taken as sRGB
    return image.convert("RGB")
