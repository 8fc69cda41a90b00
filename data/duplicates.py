"""Pictures that show the same: found by perceptual hash, then verified on small copies.

A 64-bit hash of the picture's lowest frequencies (the DCT hash of Zauner, "Implementation and
benchmarking of perceptual image hash functions", 2010, taken in zigzag order) finds candidates.
Of two pictures whose hashes nearly agree the small copies are then compared: the same scene with
something added, or in other colours, has nearly the same hash but is no duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data.files import Progress, silent

SIDE, CELLS = 32, 8  # pixels, and parts that are compared, along each side of a small copy
DISTANCE = 10  # of 64 bits: a crop of 3 % moves 4 of them, most often
CORRELATION = 0.95  # of the copies, one laid over the other
RESIDUE = 0.55  # largest difference in any part and channel, in standard deviations of the picture
HOPELESS = 0.7  # correlation as they lie below which no window of one is tried on the other
FLAT = 2.0  # levels of standard deviation below which a picture has no shapes to compare
FLAT_COLOUR = 8  # levels by which the colours of two such pictures may differ
_ROWS, _COLUMNS, _PAIRS = 64, 4096, 1024  # of hashes compared, and of pictures verified, at once
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CROPS = (0.97, 0.94)  # of the sides: windows that one picture can be of the other


@dataclass(frozen=True)
class Prints:
    """Small copies: of n pictures the k-th one's is `pixels[index[k]]`, uint8 (32, 32, 3)."""

    pixels: np.ndarray
    index: np.ndarray

    def take(self, chosen: np.ndarray) -> np.ndarray:
        """The copies of these pictures, uint8 (m, 32, 32, 3)."""
        return np.asarray(self.pixels[self.index[chosen]])


@dataclass(frozen=True)
class Match:
    """A picture that shows the same as the better one: `distance` in bits of the hash."""

    index: int
    kept: int
    distance: int
    mirrored: bool


def print_of(image: Image.Image) -> np.ndarray:
    """The small copy of an RGB picture, squashed to a square: uint8 (32, 32, 3)."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def hashes(prints: Prints, chosen: np.ndarray, *, mirrored: bool = False) -> np.ndarray:
    """The perceptual hashes, uint64 (m,), of these pictures or of their mirror images."""
    parts = [np.empty(0, np.uint64)]
    for start in range(0, len(chosen), _COLUMNS):
        copies = prints.take(chosen[start : start + _COLUMNS])
        parts.append(_hash(copies[:, :, ::-1] if mirrored else copies))
    return np.concatenate(parts)


def groups(prints: Prints, *, distance: int = DISTANCE, progress: Progress = silent) -> np.ndarray:
    """For each picture the first one of its group, int64 (n,).

    A group holds what is linked by pairs that show the same, mirrored ones too. All pairs of hashes
    are compared, 64 bits at once: 5 thousand million of them for 100,000 pictures.
    """
    labels = np.arange(len(prints.index), dtype=np.int64)
    plain, mirror = hashes(prints, labels), hashes(prints, labels, mirrored=True)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(labels), _ROWS):
        rows = plain[start : start + _ROWS]
        for one, other in _candidates(rows, start, plain, mirror, distance):
            apart = labels[one] != labels[other]
            waiting.append((one[apart], other[apart]))
            if sum(len(some) for some, _ in waiting) >= _PAIRS:
                _link(labels, prints, waiting, distance)
        progress(min(start + _ROWS, len(labels)), len(labels))
    _link(labels, prints, waiting, distance)
    return labels


def thin(
    prints: Prints, members: Sequence[int], *, distance: int = DISTANCE
) -> tuple[list[int], list[Match]]:
    """Of a group, best first: the pictures to keep, and for each other one what it doubles.

    What is only linked by others (the first and the last of a slow film) is kept.
    """
    kept: list[int] = []
    matches: list[Match] = []
    rest = np.asarray(members, np.int64)
    while len(rest):
        best, rest = int(rest[0]), rest[1:]
        same, bits, mirrored = compare(prints, np.full(len(rest), best), rest, distance=distance)
        kept.append(best)
        found = zip(rest[same], bits[same], mirrored[same], strict=True)
        matches += [Match(int(i), best, int(b), bool(m)) for i, b, m in found]
        rest = rest[~same]
    return kept, matches


def matches_between(
    prints: Prints, first: np.ndarray, second: np.ndarray, *, distance: int = DISTANCE
) -> list[Match]:
    """The pictures of `first` that show what one of `second` shows, and the nearest of those."""
    plain, mirror = hashes(prints, second), hashes(prints, second, mirrored=True)
    queries = hashes(prints, first)
    found: dict[int, Match] = {}
    for start in range(0, len(first), _ROWS):
        rows = queries[start : start + _ROWS]
        for i, j in _candidates(rows, start, plain, mirror, distance, all_columns=True):
            for match in _verified(prints, first[i], second[j], distance):
                known = found.get(match.index)
                if known is None or match.distance < known.distance:
                    found[match.index] = match
    return [found[index] for index in sorted(found)]


def compare(
    prints: Prints, one: np.ndarray, other: np.ndarray, *, distance: int = DISTANCE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair (one[k], other[k]): whether they show the same, the bits by which the hashes
    differ, and whether one is the mirror image of the other."""
    same = np.zeros(len(one), bool)
    bits, mirrored = np.full(len(one), 64, np.int64), np.zeros(len(one), bool)
    for start in range(0, len(one), _PAIRS):
        part = slice(start, start + _PAIRS)
        left, right = prints.take(one[part]), prints.take(other[part])
        for mirror in (False, True):
            seen = right[:, :, ::-1] if mirror else right
            apart = np.bitwise_count(_hash(left) ^ _hash(seen)).astype(np.int64)
            near = (apart <= distance) & (apart < np.where(same[part], bits[part], 65))
            near[near] = _show_the_same(left[near], seen[near])
            bits[part][near], mirrored[part][near], same[part][near] = apart[near], mirror, True
    return same, bits, mirrored


# Candidates ----------------------------------------------------------------------------------


def _hash(copies: np.ndarray) -> np.ndarray:
    """uint64 (n,): which of the 64 lowest frequencies but the mean are above their median."""
    grey = copies @ _LUMA  # (n, 32, 32)
    cosines, order = _cosines(), _zigzag()
    spectrum = cosines @ grey @ cosines.T  # (n, 12, 12)
    values = spectrum[:, order[:, 0], order[:, 1]]
    above = values > np.median(values, axis=1, keepdims=True)
    above &= grey.std(axis=(1, 2))[:, None] >= FLAT
    bits = above.astype(np.uint64) << np.arange(64, dtype=np.uint64)
    return np.bitwise_or.reduce(bits, axis=1)


@cache
def _cosines() -> np.ndarray:
    """The first 12 rows of the DCT of type 2, float32 (12, 32)."""
    k = np.arange(SIDE)
    return np.cos(np.pi * np.outer(np.arange(12), 2 * k + 1) / (2 * SIDE)).astype(np.float32)


@cache
def _zigzag() -> np.ndarray:
    """The 64 (row, column) of lowest frequency after the mean, int (64, 2)."""
    places = sorted((i + j, i, j) for i in range(12) for j in range(12))
    return np.array([place[1:] for place in places[1:65]])


def _candidates(
    rows: np.ndarray,
    start: int,
    plain: np.ndarray,
    mirror: np.ndarray,
    distance: int,
    *,
    all_columns: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a row (counted from `start`) and a column after it whose hashes nearly agree."""
    for left in range(0 if all_columns else start, len(plain), _COLUMNS):
        near = np.zeros((len(rows), min(_COLUMNS, len(plain) - left)), bool)
        for columns in (plain, mirror):
            apart = np.bitwise_count(rows[:, None] ^ columns[None, left : left + _COLUMNS])
            near |= apart <= distance
        i, j = np.nonzero(near)
        i, j = i + start, j + left
        after = np.full(len(i), True) if all_columns else j > i
        if after.any():
            yield i[after], j[after]


def _link(
    labels: np.ndarray,
    prints: Prints,
    waiting: list[tuple[np.ndarray, np.ndarray]],
    distance: int,
) -> None:
    """Joins the groups of all waiting pairs that show the same; those that are together by then
    cost nothing. Nothing waits afterwards."""
    none = np.empty(0, np.int64)
    one = np.concatenate([none, *(some for some, _ in waiting)])
    other = np.concatenate([none, *(some for _, some in waiting)])
    waiting.clear()
    while len(one):
        for match in _verified(prints, one[:_PAIRS], other[:_PAIRS], distance):
            low, high = sorted((labels[match.index], labels[match.kept]))
            labels[labels == high] = low
        one, other = one[_PAIRS:], other[_PAIRS:]
        apart = labels[one] != labels[other]
        one, other = one[apart], other[apart]


def _verified(prints: Prints, one: np.ndarray, other: np.ndarray, distance: int) -> Iterator[Match]:
    same, bits, mirrored = compare(prints, one, other, distance=distance)
    for k in np.flatnonzero(same):
        yield Match(int(one[k]), int(other[k]), int(bits[k]), bool(mirrored[k]))


# Verification --------------------------------------------------------------------------------


def _show_the_same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool (n,): whether one fits over the other, whole or as a window of it."""
    a, b = (_channels_first(copies) for copies in (a, b))  # (n, 3, 32, 32)
    flat_a, flat_b = _deviation(a) < FLAT, _deviation(b) < FLAT
    same = flat_a & flat_b & (np.abs(a - b).max(axis=(1, 2, 3)) <= FLAT_COLOUR)
    shaped = np.flatnonzero(~flat_a & ~flat_b)
    alike, fits = _fit_together(a[shaped], b[shaped])
    same[shaped] = fits
    unsure = shaped[~fits & (alike > HOPELESS)]
    best = _best_windows(a[unsure], b[unsure])
    for number, (rows, columns) in enumerate(_windows(SIDE)):
        inside_a, inside_b = unsure[best == 2 * number], unsure[best == 2 * number + 1]
        same[inside_a] = _fit_together(rows @ a[inside_a] @ columns.T, b[inside_a])[1]
        same[inside_b] = _fit_together(a[inside_b], rows @ b[inside_b] @ columns.T)[1]
    return same


def _channels_first(copies: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(copies, 3, 1), np.float32)


def _best_windows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which window agrees most, found at half the size and without colour: int (n,), twice its
    number in `_windows`, and one more where it is a window of b."""
    a, b = (
        _unit(copies.reshape(len(copies), 3, 16, 2, 16, 2).mean((1, 3, 5))) for copies in (a, b)
    )
    alike = [
        (_unit(rows @ one @ columns.T) * other).sum(axis=(1, 2))
        for rows, columns in _windows(SIDE // 2)
        for one, other in ((a, b), (b, a))
    ]
    return np.argmax(alike, axis=0)


def _unit(grey: np.ndarray) -> np.ndarray:
    centred = grey - grey.mean(axis=(1, 2), keepdims=True)
    return centred / np.sqrt(np.maximum(np.square(centred).sum((1, 2), keepdims=True), 1e-6))


def _fit_together(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The correlation over all (n,), and whether it is high and no part differs, bool (n,).

    Brightness and contrast are divided out.
    """
    x, y = _standardised(a), _standardised(b)
    shapes_x, shapes_y = (z - z.mean(axis=(2, 3), keepdims=True) for z in (x, y))
    power = np.square(shapes_x).mean(axis=(1, 2, 3)) * np.square(shapes_y).mean(axis=(1, 2, 3))
    alike = (shapes_x * shapes_y).mean(axis=(1, 2, 3)) / np.sqrt(np.maximum(power, 1e-12))
    step = SIDE // CELLS
    parts = (x - y).reshape(len(x), 3, CELLS, step, CELLS, step).mean((3, 5))
    return alike, (alike > CORRELATION) & (np.abs(parts).max((1, 2, 3)) < RESIDUE)


def _standardised(copies: np.ndarray) -> np.ndarray:
    """Mean brightness 0 and mean deviation 1; the channels keep their proportions."""
    mean = copies.mean(axis=(1, 2, 3), keepdims=True)
    return (copies - mean) / np.maximum(_deviation(copies), 3 * FLAT)[:, None, None, None]


def _deviation(copies: np.ndarray) -> np.ndarray:
    """Of the channels (n, 3, 32, 32), each about its own mean: (n,) levels."""
    return np.sqrt(copies.var(axis=(2, 3)).mean(axis=1))


@cache
def _windows(side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of matrices (side, side) that enlarge a window of the picture to all of it."""
    places = (0.0, 0.5, 1.0)
    return [
        (_enlarge(share, top, side), _enlarge(share, left, side))
        for share in _CROPS
        for top in places
        for left in places
    ]


def _enlarge(share: float, place: float, side: int) -> np.ndarray:
    """Linear interpolation along one axis of the `share` of it that begins at `place` of the rest,
    float32 (side, side)."""
    at = np.clip((place * (1 - share) * side) + (np.arange(side) + 0.5) * share - 0.5, 0, side - 1)
    low = np.minimum(at.astype(int), side - 2)
    matrix = np.zeros((side, side), np.float32)
    matrix[np.arange(side), low] = 1 - (at - low)
    matrix[np.arange(side), low + 1] = at - low
    return matrix
