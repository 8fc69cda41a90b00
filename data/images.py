"""One picture: any readable file to upright sRGB, and sRGB to the size of its bucket."""

from __future__ import annotations

import io
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from data import counter

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]  # (width, height) in pixels
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".avif"}
)
_CONVERT = "cannot be read here: convert it to JPEG or PNG, for instance with ImageMagick"
# What people take for pictures too, and what to do about it.
UNREADABLE_EXTENSIONS = {
    ".heic": f"HEIC {_CONVERT}, or set the camera to JPEG",
    ".heif": f"HEIF {_CONVERT}, or set the camera to JPEG",
    ".hif": f"HEIF {_CONVERT}, or set the camera to JPEG",
    ".jxl": f"JPEG XL {_CONVERT}",
}
# Named, because Pillow would otherwise try every decoder it has, with Ghostscript among them.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # JPEG's opens MPO too
# Not "I" and "F", whose range no one knows, nor "HSV".
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB"}
MODES |= {"I;16", "I;16L", "I;16B", "I;16N"}
# Pillow's own limit, beyond which it raises, made explicit: others may change Pillow's. Decoded,
# that is 0.7 GB. From half of it on Pillow would warn, of scans and panoramas that are all right.
MAX_PIXELS = 178_956_970
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# JPEGs are decoded at 1/2, 1/4 or 1/8 where that leaves so many times the size wanted. Against the
# full decode, a natural picture of 12 megapixels differs by 0.6 to 1.0 of 255 on average then (45
# to 49 dB); at 1.0 by 1.9 (40 dB), and at 2.0 a square bucket of 768 needs a full decode.
COVER = 1.5
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # from one level of a PNG to the next, of 255
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
    is laid over `background`, of an animation the first frame is taken, and 16-bit pixels are
    scaled to 8. With `cover`, a big JPEG is decoded at a fraction of its size that still covers
    that (width, height) 1.5 times, which is several times faster.

    Raises what Pillow raises for a damaged file, and ValueError for unusual kinds of pixels.
    """
    return _flatten(_upright(decode(file, cover=cover)), background)


def decode(file: Path | IO[bytes], *, cover: Size | None = None) -> Image.Image:
    """The first frame, decoded to the last pixel, in the mode of the file; 16-bit grey from black,
    0, to white, 65535, whatever the file says of its levels. Raises as `open_image`."""
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(
                f"{image.width} x {image.height} pixels are too many: at most {MAX_PIXELS} are read"
            )
        stored = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
        # Of a PNG that is not loaded yet, the orientation would load it and hide what is broken.
        if cover is not None and image.format in ("JPEG", "MPO"):
            width, height = (math.ceil(COVER * side) for side in cover)
            sideways = orientation(image) >= 5
            image.draft(None, (height, width) if sideways else (width, height))
        image.load()
    if image.mode not in MODES:
        raise ValueError(f"pixels of kind {image.mode} are not understood: save it as 8-bit RGB")
    _mend_clear_colour(image, stored)
    _mend_levels(image)
    return image


def _mend_clear_colour(image: Image.Image, stored: str) -> None:
    """Makes a colour that a PNG calls transparent, kept as the file has it, one of the pixels'.
    `stored`: Pillow's name for the file's pixels."""
    clear = image.info.get("transparency")
    if stored.startswith("RGB;16") and isinstance(clear, tuple):  # of which 8 bits are decoded
        raise ValueError(
            "has 16-bit colour, one of them transparent, which is not understood: save it with an "
            "alpha channel, or as 8-bit"
        )
    if stored in _GREY_STEPS and isinstance(clear, int):
        image.info["transparency"] = clear * _GREY_STEPS[stored]


def _mend_levels(image: Image.Image) -> None:
    """Spreads the 12-bit grey of a TIFF over 16, and inverts 16-bit grey that has white as 0, in
    place; Pillow does neither (TIFF 6.0, section 8: BitsPerSample, PhotometricInterpretation).
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None or not image.mode.startswith("I;16"):
        return
    most = (1 << tags.get(258, (16,))[0]) - 1
    inverted = tags.get(262) == 0
    if most < 65535 or inverted:
        levels = np.asarray(image).astype(np.uint32) * 65535 // most
        levels = (65535 - levels if inverted else levels).astype(np.asarray(image).dtype)
        image.paste(Image.fromarray(levels))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block raises nearly anything, and the pixels are still good
        return 1
    return value if value in ORIENTATIONS else 1


def fit_geometry(
    width: int, height: int, size: Size, centre: tuple[float, float] = (0.5, 0.5)
) -> Fit:
    """How a picture of width x height is scaled to cover `size`, and what a crop there keeps.

    `centre` is the point (x, y), from 0 to 1, that the box has in its middle, or as nearly as it
    can while it stays inside the picture.
    """
    scale = max(size[0] / width, size[1] / height)
    kept_width, kept_height = min(size[0] / scale, width), min(size[1] / scale, height)
    left = min(max(width * centre[0] - kept_width / 2, 0), width - kept_width)
    top = min(max(height * centre[1] - kept_height / 2, 0), height - kept_height)
    box = (left, top, min(left + kept_width, width), min(top + kept_height, height))
    return Fit(scale, box, 1 - kept_width * kept_height / (width * height))


def crop_centres(
    width: int,
    height: int,
    size: Size,
    *,
    crop: Literal["centre", "random", "focus"],
    focus: tuple[float, float] | None,
    sha256: str,
    variants: int,
) -> list[tuple[float, float]]:
    """The centres that a picture of width x height is cropped about to `size`.

    One of them: its middle, or with "focus" its focus point if it has one. With "random" there are
    `variants`, uniform over the places where the box can be, and a function of the picture's
    `sha256` and their number alone: more variants begin with the same ones.
    """
    if crop != "random":
        return [focus] if crop == "focus" and focus is not None else [(0.5, 0.5)]
    left, top, right, bottom = fit_geometry(width, height, size).box
    middle = np.array([0.5, 0.5])
    slack = 1 - np.array([(right - left) / width, (bottom - top) / height])
    draws = [counter.generator(0, "crop", sha256, number).random(2) for number in range(variants)]
    centres = [middle + slack * (draw - 0.5) for draw in draws]
    return [(float(x), float(y)) for x, y in centres]


def fit(image: Image.Image, size: Size, centre: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The RGB picture scaled to cover `size`, cropped about `centre`: uint8 (height, width, 3)."""
    box = fit_geometry(*image.size, size, centre).box
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
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    colours = _to_srgb(image.convert("L" if image.mode == "LA" else "RGB"), profile)
    flat = Image.new("RGB", image.size, background)
    flat.paste(colours, mask=image.convert("RGBA").getchannel("A"))
    return flat


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit; with the one level that a PNG may call transparent as alpha."""
    pixels = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode == "LAB":  # in which a profile would say nothing new
        profile = _LAB
    if profile:
        try:
            transform = _transform(profile, image.mode)
            return image if transform is None else _applied(transform, image)
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that is broken or for other channels: the pixels are taken as sRGB
    return image if image.mode == "RGB" else image.convert("RGB")


_SRGB = ImageCms.createProfile("sRGB")
_LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From that profile to sRGB; None where it is sRGB itself, give or take one level. Most are,
    and converting costs as much as decoding."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    if mode != "RGB":
        return transform
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    converted = np.asarray(_applied(transform, Image.fromarray(grid)))
    return None if np.abs(converted.astype(int) - grid).max() <= 1 else transform


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only None in place
    return converted
