"""An invisible watermark of a few bytes, in the luma's wavelet and cosine coefficients (DWT-DCT).

    marked = embed(pixels, b"toy1")
    assert detect(marked) == b"toy1"

A pattern of 128 x 128 pixels is repeated over the picture: in the low band of a Haar wavelet, each
block of 8 x 8 has signs added to its 39 cosine coefficients of middle frequency. A third of the
signs are always the same and tell where the pattern lies. The others are seven words, one for each
byte, of 256 known ones: the payload's four bytes and three of a hash that proves them. As all of
this is linear, the pattern is made once, in pixels; it lies where the picture happens to resemble
it most, and stronger where there is more texture.

Detection evens out the picture, takes its Fourier coefficients at the pattern's frequencies for
every scale in question, which lays all repetitions over each other, and correlates their phases
with the pattern's for all shifts at once (spread spectrum: Cox et al. 1997; phase correlation:
Kuglin and Hines 1975). At most ATTEMPTS readings are held against their hash, so a picture without
a mark is taken for a marked one with a probability of ATTEMPTS / 2^24 = 5e-7 at the most.

What it survives is in docs/benchmarks.md (python scripts/benchmark.py watermark). Its pattern is no
secret: whoever reads this can remove a mark, or put one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from data.counter import generator

PAYLOAD_BYTES = 4
CHECK_BYTES = 3
ATTEMPTS = 8
SMALLEST = 64  # pixels of a side
SCALES = (0.5, 2.0)  # of the picture now to the picture that was marked
_TILE, _BLOCK, _HALF = 128, 16, 8  # pixels: of the pattern, of a block, of it in the low band
_BAND = 40  # cycles per tile: the pattern has no more
_LARGEST = 1024  # pixels of a side that are looked at
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Detection(NamedTuple):
    """What was found in a picture."""

    payload: bytes | None
    """Without the zero bytes at its end; None where nothing was found that proves itself."""
    score: float
    """How far the pattern's correlation stands out, in standard deviations over all shifts: 4 to 6
    of a picture without mark."""
    scale: float
    """Of the picture to the one that was marked."""
    read: bytes
    """The seven bytes that were read, right or wrong."""


@dataclass(frozen=True)
class _Layout:
    """Which of a tile's coefficients say what."""

    pilot: np.ndarray
    """Numbers of the coefficients that are always the same."""
    signs: np.ndarray
    words: list[tuple[np.ndarray, np.ndarray]]
    """For each byte, the numbers of its coefficients (n), and the 256 words (256, n)."""


def embed(pixels: np.ndarray, payload: bytes, *, strength: float | None = None) -> np.ndarray:
    """The picture with the payload in it: uint8 (H, W, 3) to the same.

    payload: 1 to 4 bytes, the last not zero. strength: root mean square of the change in levels;
    default: 2.3 up to 256 x 256 pixels (40.9 dB), falling to 1.5 at 768 x 768 (44.6 dB). Raises
    ValueError for another payload or a picture with a side below SMALLEST.
    """
    check_payload(payload)
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(f"a watermark needs {SMALLEST} pixels a side, not {width} x {height}")
    tile = _pattern(payload)
    down, right = _likest(pixels, tile)
    repeats = (height // _TILE + 2, width // _TILE + 2)
    pattern = np.tile(np.roll(tile, (down, right), (0, 1)), repeats)[:height, :width]
    pattern = pattern * _gain(pixels @ _LUMA, -down % _BLOCK, -right % _BLOCK)
    pattern *= (strength or _strength(height * width)) / np.sqrt((pattern**2).mean())
    return np.clip(np.rint(pixels + pattern[..., None]), 0, 255).astype(np.uint8)


def check_payload(payload: bytes) -> None:
    """Raises ValueError unless `embed` takes it."""
    if not 0 < len(payload) <= PAYLOAD_BYTES or payload.endswith(b"\0"):
        raise ValueError(
            f"a watermark holds 1 to {PAYLOAD_BYTES} bytes, the last not zero; {payload!r} has "
            f"{len(payload)}"
        )


def detect(pixels: np.ndarray) -> bytes | None:
    """The payload of a picture, uint8 (H, W, 3), that may have been compressed, cropped or resized
    since; None where there is none."""
    return examine(pixels).payload


def examine(pixels: np.ndarray) -> Detection:
    """`detect` with what it rests on. About 0.1 s for a picture as it was marked, and 1.5 s at 768
    x 768 pixels where all scales are tried."""
    if min(pixels.shape[:2]) < _BLOCK:
        return Detection(None, 0.0, 1.0, bytes(PAYLOAD_BYTES + CHECK_BYTES))
    evened = _evened(_middle(pixels))
    found = [_reading(evened, 1.0)]
    if found[0].payload is None:
        for scale in _likely_scales(evened):
            found.append(_reading(evened, scale))
            if found[-1].payload is not None:
                return found[-1]
    return max(found, key=lambda one: one.score)


# The pattern


@cache
def _places() -> np.ndarray:
    """Rows and columns of the coefficients that are used of a block."""
    row, column = np.mgrid[0:_HALF, 0:_HALF]
    return np.argwhere((row + column >= 3) & (row + column <= 8))


@cache
def _layout() -> _Layout:
    order = generator(0, "watermark", "places").permutation((_TILE // _BLOCK) ** 2 * len(_places()))
    pilot, rest = np.split(order, [len(order) // 3])
    each = len(rest) // (PAYLOAD_BYTES + CHECK_BYTES)
    words = [
        (rest[i * each : (i + 1) * each], _signs((256, each), "word", i))
        for i in range(PAYLOAD_BYTES + CHECK_BYTES)
    ]
    return _Layout(pilot, _signs((len(pilot),), "pilot"), words)


def _signs(shape: tuple[int, ...], *purpose: str | int) -> np.ndarray:
    return generator(0, "watermark", *purpose).choice([-1.0, 1.0], shape)


def _pattern(payload: bytes) -> np.ndarray:
    """The tile (128, 128) that says a payload."""
    layout = _layout()
    coefficients = np.zeros((_TILE // _BLOCK) ** 2 * len(_places()))
    coefficients[layout.pilot] = layout.signs
    said = _with_check(payload.ljust(PAYLOAD_BYTES, b"\0"))
    for (places, words), byte in zip(layout.words, said, strict=True):
        coefficients[places] = words[byte]
    return _to_pixels(coefficients)


def _with_check(payload: bytes) -> bytes:
    return payload + hashlib.blake2b(payload, digest_size=CHECK_BYTES, person=b"watermark").digest()


@cache
def _cosines() -> np.ndarray:
    """The orthonormal DCT-II as a matrix (8, 8)."""
    frequency, at = np.mgrid[0:_HALF, 0:_HALF]
    matrix = np.cos(np.pi * frequency * (2 * at + 1) / (2 * _HALF)) * np.sqrt(2 / _HALF)
    matrix[0] /= np.sqrt(2)
    return matrix


def _to_pixels(coefficients: np.ndarray) -> np.ndarray:
    """A tile of those coefficients and no others: the inverse DCT, then the inverse wavelet."""
    blocks, (rows, columns) = _TILE // _BLOCK, _places().T
    spectra = np.zeros((blocks, blocks, _HALF, _HALF))
    spectra[:, :, rows, columns] = coefficients.reshape(blocks, blocks, -1)
    low = np.einsum("ku,abkl,lv->aubv", _cosines(), spectra, _cosines()).reshape(_TILE // 2, -1)
    return low.repeat(2, 0).repeat(2, 1) / 2


def _to_coefficients(tile: np.ndarray) -> np.ndarray:
    """The other way: the wavelet's low band, its blocks' DCT, and of that what is used."""
    blocks, (rows, columns) = _TILE // _BLOCK, _places().T
    low = (tile[::2, ::2] + tile[1::2, ::2] + tile[::2, 1::2] + tile[1::2, 1::2]) / 2
    low = low.reshape(blocks, _HALF, blocks, _HALF)
    spectra = np.einsum("ku,aubv,lv->abkl", _cosines(), low, _cosines())
    return spectra[:, :, rows, columns].ravel()


# Embedding


def _strength(pixels: int) -> float:
    return 2.3 * min(1.0, 256 * 256 / pixels) ** 0.195


def _likest(pixels: np.ndarray, tile: np.ndarray) -> tuple[int, int]:
    """How far down and right the tile is to be moved to where the picture itself resembles it most:
    what would disturb the mark is made to help it."""
    correlation = _correlation(_phases(_evened(pixels), 1.0), tile, _TILE)
    down, right = divmod(int(correlation.argmax()), _TILE)
    return down, right


def _gain(luma: np.ndarray, top: int, left: int) -> np.ndarray:
    """How strong the pattern is at each pixel (H, W), by the texture of its block; blocks begin
    `top` and `left` pixels outside."""
    height, width = luma.shape
    bottom, beyond = -(height + top) % _BLOCK, -(width + left) % _BLOCK
    padded = np.pad(luma, ((top, bottom), (left, beyond)), mode="edge")
    rows, columns = padded.shape[0] // _BLOCK, padded.shape[1] // _BLOCK
    texture = padded.reshape(rows, _BLOCK, columns, _BLOCK).std((1, 3))
    gain = np.clip(0.8 + texture / 30, 0.8, 1.8).repeat(_BLOCK, 0).repeat(_BLOCK, 1)
    return gain[top : top + height, left : left + width]


# Detection


def _middle(pixels: np.ndarray) -> np.ndarray:
    top, left = ((side - min(side, _LARGEST)) // 2 for side in pixels.shape[:2])
    return pixels[top : top + _LARGEST, left : left + _LARGEST]


def _evened(pixels: np.ndarray) -> np.ndarray:
    """Luma without its slow changes, by its local deviation, so that edges weigh no more than flat
    parts; float32 (H, W)."""
    luma = (pixels @ _LUMA).astype(np.float64)
    high = luma - _blurred(_blurred(luma, 6), 6)
    deviation = np.sqrt(np.maximum(_blurred(high**2, 4), 0)) + 1  # a level, for what is flat
    return np.clip(high / deviation, -2.5, 2.5).astype(np.float32)


def _blurred(values: np.ndarray, radius: int) -> np.ndarray:
    """Means over squares of 2 radius + 1 pixels."""
    size = 2 * radius + 1
    for axis in (0, 1):
        margins = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
        sums = np.moveaxis(np.pad(values, margins, mode="reflect").cumsum(axis), axis, 0)
        values = np.moveaxis((sums[size:] - sums[:-size]) / size, 0, axis)
    return values


def _phases(evened: np.ndarray, scale: float) -> np.ndarray:
    """Fourier coefficients (2 * _BAND + 1, _BAND + 1) of a tile over which all of the picture is
    laid, at that scale; of each only the phase, so that no period of the picture's own stands
    out."""
    rows, columns = (np.arange(side) + 0.5 - scale / 2 for side in evened.shape)
    turn = -2j * np.pi / (_TILE * scale)
    across = np.exp(turn * np.outer(columns, np.arange(_BAND + 1))).astype(np.complex64)
    along = np.exp(turn * np.outer(np.arange(-_BAND, _BAND + 1), rows)).astype(np.complex64)
    both = evened @ np.concatenate([across.real, across.imag], axis=1)
    folded = along @ (both[:, : _BAND + 1] + 1j * both[:, _BAND + 1 :])
    return folded / np.maximum(np.abs(folded), 1e-9)


def _correlation(phases: np.ndarray, tile: np.ndarray, side: int) -> np.ndarray:
    """With the tile, for each of side x side shifts over it."""
    return _inverse(phases * _spectrum(tile).conj(), side)


def _spectrum(tile: np.ndarray) -> np.ndarray:
    whole = np.fft.rfft2(tile)
    return np.concatenate([whole[-_BAND:], whole[: _BAND + 1]])[:, : _BAND + 1]


def _inverse(spectrum: np.ndarray, side: int) -> np.ndarray:
    whole = np.zeros((side, side // 2 + 1), complex)
    whole[: _BAND + 1, : _BAND + 1] = spectrum[_BAND:]
    whole[-_BAND:, : _BAND + 1] = spectrum[:_BAND]
    return np.fft.irfft2(whole, (side, side))


@cache
def _pilot() -> np.ndarray:
    """The part of the pattern that is always the same (128, 128)."""
    layout = _layout()
    coefficients = np.zeros((_TILE // _BLOCK) ** 2 * len(_places()))
    coefficients[layout.pilot] = layout.signs
    return _to_pixels(coefficients)


def _likely_scales(evened: np.ndarray) -> list[float]:
    """The scales at which the pilot stands out most, the best first."""
    step = min(0.02, 3 / max(evened.shape))  # half of it puts the picture's ends 0.75 pixels off
    low, high = np.log(SCALES)
    grid = np.exp(np.arange(low, high + step, step))
    scores = np.array([_score(evened, scale) for scale in grid])
    chosen: list[float] = []
    while len(chosen) < ATTEMPTS - 1:
        best = int(scores.argmax())
        scores[max(0, best - 2) : best + 3] = -np.inf
        near = grid[best] * (1 + step * np.linspace(-0.5, 0.5, 5))
        chosen.append(float(max(near, key=lambda scale: _score(evened, scale))))
    return chosen


def _score(evened: np.ndarray, scale: float) -> float:
    correlation = _correlation(_phases(evened, scale), _pilot(), _TILE)
    return float(correlation.max() / max(correlation.std(), 1e-12))


def _reading(evened: np.ndarray, scale: float) -> Detection:
    """What the picture says at one scale, where the pilot lies best."""
    side = 2 * _TILE  # to half a pixel
    phases = _phases(evened, scale)
    correlation = _correlation(phases, _pilot(), side)
    down, right = np.array(divmod(int(correlation.argmax()), side)) * _TILE / side
    cycles = np.add.outer(np.arange(-_BAND, _BAND + 1) * down, np.arange(_BAND + 1) * right)
    moved = _inverse(phases * np.exp(2j * np.pi / _TILE * cycles), _TILE)
    coefficients = _to_coefficients(moved)
    read = bytes(int((words @ coefficients[at]).argmax()) for at, words in _layout().words)
    payload = read[:PAYLOAD_BYTES]
    proven = _with_check(payload) == read and any(payload)
    score = float(correlation.max() / max(correlation.std(), 1e-12))
    return Detection(payload.rstrip(b"\0") if proven else None, score, scale, read)
