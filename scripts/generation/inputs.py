"""The pictures given beside prompts: which belong together, at what size, and as pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.images import EXTENSIONS, Size, fit_geometry, open_image
from data.maps import DOWN, open_depth, open_mask
from scripts.generation.config import GenerateConfig, Mode
from train.config import UserError

MULTIPLE = 8
_WHITE = 128  # from which diffusers repaints
_ASPECT = 0.02  # by which the aspect of a mask may differ from its picture's
_LARGE = 2.0  # times as many pixels as the base was trained at


@dataclass(frozen=True)
class Source:
    """What one picture is made from, at the `size` (width, height) in pixels that it is read at."""

    size: Size
    own: Size
    """Of the picture itself, with what is added to it."""
    image: Path | None = None
    mask: Path | None = None
    depth: Path | None = None
    controls: tuple[Path, ...] = ()
    outpaint: tuple[int, ...] = ()
    """Pixels of the picture's own to add left, top, right and bottom."""

    def facts(self) -> dict[str, Any]:
        """Names and hashes of the files, for a picture's settings."""
        files = {"image": self.image, "mask": self.mask, "depth": self.depth}
        named: dict[str, Any] = {key: _identity(file) for key, file in files.items() if file}
        if self.controls:
            named["control_images"] = [_identity(file) for file in self.controls]
        return named | ({"outpaint": list(self.outpaint)} if self.outpaint else {})

    def pixels(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3), with its own edges drawn out where it is extended."""
        assert self.image is not None
        image = _read("image", self.image, open_image)
        if self.outpaint:
            image = Image.fromarray(np.pad(np.asarray(image), _margins(self.outpaint, 3), "edge"))
        return fitted(image, self.size, Image.Resampling.LANCZOS)

    def repainted(self) -> np.ndarray:
        """The mask, uint8 (H, W), 255 where the picture is to be repainted."""
        if self.mask is not None:
            mask = _read("mask", self.mask, open_mask)
        else:
            assert self.image is not None
            width, height = _read("image", self.image, open_image).size
            kept = np.zeros((height, width), dtype=np.uint8)
            margins = _margins(self.outpaint, 2)
            mask = Image.fromarray(np.pad(kept, margins, constant_values=255))
        return fitted(mask, self.size, Image.Resampling.BOX)

    def depth_map(self) -> np.ndarray:
        """The depth map of a file at the size of the latents, float32 (H/8, W/8) from -1 to 1."""
        assert self.depth is not None
        width, height = self.size
        small = (width // DOWN, height // DOWN)
        depth = fitted(_read("depth", self.depth, open_depth), small, Image.Resampling.BICUBIC)
        return scaled(depth, f"depth={self.depth}")

    def control(self, number: int) -> np.ndarray:
        """The map of one ControlNet, uint8 (H, W, 3)."""
        image = _read("control_image", self.controls[number], open_image)
        return fitted(image, self.size, Image.Resampling.LANCZOS)


def sources(config: GenerateConfig, mode: Mode, native: int | None) -> list[Source]:
    """What pictures are made from, one after the other; none where prompts and size are all.

    native: the side in pixels that the base was trained at. Every file is decoded once, so that one
    that is broken is told before any weights are loaded. Raises UserError.
    """
    leading = config.image or (config.control_image[0] if config.control_image else None)
    if leading is None:
        return []
    key = "image" if config.image else "control_image"
    return [_source(config, mode, file, native) for file in listed(key, leading)]


def listed(key: str, path: Path) -> list[Path]:
    """A file, or the pictures of a folder in order. Raises UserError where there are none."""
    if not path.is_dir():
        return [path]
    visible = (file for file in path.iterdir() if not file.name.startswith("."))
    files = sorted(file for file in visible if file.suffix.lower() in EXTENSIONS)
    if not files:
        raise UserError(f"{key}={path} is a folder without pictures")
    return files


def _source(config: GenerateConfig, mode: Mode, file: Path, native: int | None) -> Source:
    image = file if config.image else None
    controls = [_beside("control_image", path, file) for path in config.control_image]
    own = _read("image" if image else "control_image", file, open_image).size
    left, top, right, bottom = config.outpaint or (0, 0, 0, 0)
    own = (own[0] + left + right, own[1] + top + bottom)
    size = target_size(own, config.width, config.height, None if mode == "upscale" else native)
    source = Source(
        size,
        own,
        image,
        mask=_beside("mask", config.mask, file),
        depth=_beside("depth", config.depth, file),
        controls=tuple(filter(None, controls)),
        outpaint=tuple(config.outpaint),
    )
    _check(source)
    return source


def _beside(key: str, given: Path | None, file: Path) -> Path | None:
    """What goes with a picture: the file that is given, or of a folder the one of its name."""
    if given is None or not given.is_dir():
        return given
    found = [path for path in listed(key, given) if path.stem == file.stem]
    if len(found) != 1:
        raise UserError(
            f"{key}={given} has {len(found) or 'no'} pictures named {file.stem}, to go with {file}"
        )
    return found[0]


def _check(source: Source) -> None:
    """Raises UserError for a file that is broken, of another shape than its picture, or says
    nothing."""
    readers: list[tuple[str, Path | None, Callable[[Path], Image.Image]]] = [
        ("mask", source.mask, open_mask),
        ("depth", source.depth, open_depth),
        *(("control_image", file, open_image) for file in source.controls),
    ]
    for key, file, reader in readers:
        if file is None:
            continue
        (width, height), (wide, high) = source.own, _read(key, file, reader).size
        if abs(math.log(wide * height / (high * width))) > _ASPECT:
            raise UserError(
                f"{key}={file} has {wide} x {high} pixels and its picture {width} x {height}: "
                "they must show the same, in the same aspect"
            )
    if source.mask is not None and source.repainted().max() < _WHITE:
        raise UserError(f"mask={source.mask} is black all over: white is what is repainted")
    if source.depth is not None:
        source.depth_map()


def target_size(own: Size, width: int | None, height: int | None, native: int | None) -> Size:
    """The size that a picture is brought to: the one that is asked for, of which one side follows
    from the other, or its own, each side the nearest multiple of 8.

    One of far more pixels than `native` squared, which no base draws well, is brought down to that.
    """
    if width and height:
        return width, height
    scale = width / own[0] if width else height / own[1] if height else 1.0
    if scale == 1 and native and own[0] * own[1] > _LARGE * native**2:
        scale = native / math.sqrt(own[0] * own[1])
    return width or _nearest(own[0] * scale), height or _nearest(own[1] * scale)


def fitted(image: Image.Image, size: Size, resample: Image.Resampling) -> np.ndarray:
    """The middle of a picture that covers the size (width, height), as an array."""
    return np.asarray(image.resize(size, resample, box=fit_geometry(*image.size, size).box))


def scaled(depth: np.ndarray, what: str) -> np.ndarray:
    """Depth with its least at -1 and its greatest at 1, float32: as it is, 16 bits of it are
    infinite in fp16 and collapse in bf16, which diffusers turns it to before it scales it.

    Raises UserError, naming `what`, for a map without any difference.
    """
    least, most = float(depth.min()), float(depth.max())
    if not most > least:
        raise UserError(f"{what} is of one level all over: it says no depth")
    return (2 * (depth.astype(np.float64) - least) / (most - least) - 1).astype(np.float32)


def pasted(made: np.ndarray, original: np.ndarray, mask: np.ndarray, blur: int) -> np.ndarray:
    """Pixels uint8 (H, W, 3) with the original's, to the bit, where the mask (H, W) is black; what
    was made comes in over `blur` pixels within the white."""
    share = _faded(mask >= _WHITE, blur)[..., None]
    return np.rint(original + share * (made.astype(np.float32) - original)).astype(np.uint8)


def _faded(white: np.ndarray, blur: int) -> np.ndarray:
    """float32 (H, W): 0 outside what is white and 1 from `blur` pixels within it, or, of what is
    narrower, in its middle."""
    depth, inside = np.zeros(white.shape, dtype=np.uint8), white.astype(np.uint8)
    for _ in range(blur + 1):
        depth += inside
        inside = _of_neighbours(np.minimum, inside)
    deepest = depth
    for _ in range(blur):
        deepest = _of_neighbours(np.maximum, deepest)
    return depth.astype(np.float32) / np.maximum(deepest, 1)


def _of_neighbours(pick: np.ufunc, values: np.ndarray) -> np.ndarray:
    """The least or greatest of each 3 x 3 values of (H, W); beyond the edge it goes on alike."""
    wide = np.pad(values, 1, "edge")
    rows = pick(pick(wide[:-2], wide[1:-1]), wide[2:])
    return pick(pick(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def note_sizes(found: Sequence[Source]) -> str | None:
    """What is to be said of pictures that are not used at their own size."""
    changed = []
    for source in found:
        if source.own != source.size:
            (width, height), (wide, high) = source.own, source.size
            file = source.image or source.controls[0]
            changed.append(f"{file.name} {width} x {height} as {wide} x {high}")
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"note: resized and cropped: {', '.join(changed[:3])}{more}" if changed else None


def _nearest(side: float) -> int:
    return max(MULTIPLE, math.floor(side / MULTIPLE + 0.5) * MULTIPLE)


def _margins(outpaint: Sequence[int], dimensions: int) -> list[tuple[int, int]]:
    left, top, right, bottom = outpaint
    return [(top, bottom), (left, right), (0, 0)][:dimensions]


def _read(key: str, file: Path, reader: Callable[[Path], Image.Image]) -> Image.Image:
    try:
        return reader(file)
    except Exception as error:  # a broken file raises nearly anything
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={file} cannot be read as a picture ({reason})") from None


def _identity(file: Path) -> dict[str, str]:
    try:
        with file.open("rb") as stream:
            return {"name": file.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error})") from None
