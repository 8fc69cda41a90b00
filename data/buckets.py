"""Aspect buckets: the few sizes that pictures are brought to, so that they can share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.images import Size
from train.config import Cropping, UserError

ROUNDING = 1e-12  # more than the relative error of a squared ratio in float64


class Account(NamedTuple):
    """What becomes of each of n pictures in its bucket."""

    scale: np.ndarray  # (n,) float64, of both sides
    cropped: np.ndarray  # (n,) float64, share of the picture's pixels that is cut off, 0 to 1
    enlarged: np.ndarray  # (n,) bool


@dataclass(frozen=True)
class BucketRow:
    """What one bucket holds."""

    size: Size
    images: int
    cropped: float  # mean share of pixels cut off, from 0 to 1
    most_cropped: float  # the largest share
    enlarged: int  # images smaller than the bucket, which are scaled up


def plan_buckets(
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    resolutions: Sequence[int],
    step: int,
    min_side: int | None = None,
    max_side: int | None = None,
    upscale: bool = True,
) -> np.ndarray:
    """The bucket (width, height) in pixels of each of n pictures: int32 (n, 2).

    Each resolution has its own `make_buckets`, of which a picture gets the one that `assign` says.
    Of several resolutions it gets the largest whose bucket it fills without being enlarged, or else
    the smallest. Without `upscale`, a picture that does not fill that either gets a bucket of its
    own: the largest inside it, with sides in steps, and with the area and the longest side of the
    smallest resolution. Such a picture must not be `too_small`. Raises UserError as `make_buckets`.
    """
    pictures = np.stack([widths, heights], axis=1).astype(np.int32)  # (n, 2)
    assert pictures.min(initial=1) > 0
    smallest, *larger = sorted(resolutions)
    sizes = _nearest(
        pictures, make_buckets(smallest, step=step, min_side=min_side, max_side=max_side)
    )
    for resolution in larger:
        buckets = make_buckets(resolution, step=step, min_side=min_side, max_side=max_side)
        wanted = _nearest(pictures, buckets)
        filled = (wanted <= pictures).all(axis=1)
        sizes[filled] = wanted[filled]
    if not upscale:
        unfilled = (sizes > pictures).any(axis=1)
        longest = _limits(smallest, step, min_side, max_side)[1]
        sizes[unfilled] = _inside(pictures[unfilled], smallest, step, longest)
    return sizes


def buckets_of(cropping: Cropping, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """`plan_buckets` as a configuration says: int32 (n, 2)."""
    return plan_buckets(
        widths,
        heights,
        resolutions=cropping.resolutions,
        step=cropping.bucket_step,
        min_side=cropping.min_side,
        max_side=cropping.max_side,
        upscale=cropping.upscale,
    )


def too_small(widths: np.ndarray, heights: np.ndarray, step: int) -> np.ndarray:
    """Which pictures cannot hold even a bucket of one step: (n,) bool. Without `upscale` these have
    to be left out."""
    return np.minimum(widths, heights) < step


def account(widths: np.ndarray, heights: np.ndarray, sizes: np.ndarray) -> Account:
    """What `images.fit_geometry` says of each picture at its size (n, 2)."""
    across, down = sizes[:, 0] / widths, sizes[:, 1] / heights
    scale = np.maximum(across, down)
    cropped = 1 - np.minimum(across, down) / scale
    return Account(scale, cropped, scale > 1)


def bucket_table(sizes: np.ndarray, account: Account) -> list[BucketRow]:
    """One row per bucket in use, the fullest first, for a person to read."""
    codes, members, images = np.unique(pack(sizes), return_inverse=True, return_counts=True)
    cropped = np.bincount(members, account.cropped) / images
    most = np.zeros(len(codes))
    np.maximum.at(most, members, account.cropped)
    enlarged = np.bincount(members, account.enlarged)
    rows = [
        BucketRow(unpack(code), int(images[at]), float(cropped[at]), float(most[at]), int(larger))
        for at, (code, larger) in enumerate(zip(codes, enlarged, strict=True))
    ]
    return sorted(rows, key=lambda row: (-row.images, row.size))


def pack(sizes: np.ndarray) -> np.ndarray:
    """Sizes (n, 2) as one number each, int64 (n,), which sort and compare as the sizes do."""
    return sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]


def unpack(code: int) -> Size:
    """The size behind a number of `pack`."""
    return int(code) >> 32, int(code) & 0xFFFFFFFF


def make_buckets(
    resolution: int, *, step: int = 64, min_side: int | None = None, max_side: int | None = None
) -> list[Size]:
    """Every useful (width, height) in pixels of at most resolution ** 2 pixels, sorted.

    The largest square; for each width the largest height that fits; and the transposes. All sides
    are multiples of `step` between `min_side` (default: half of `resolution`, rounded down to a
    step) and `max_side` (default: twice `resolution`). Raises UserError where no size is left.
    """
    if step < 1 or resolution < step:
        raise UserError(
            f"data.resolution={resolution} is less than data.bucket_step={step} (pixels): "
            "raise the first or lower the second"
        )
    lowest, highest = _limits(resolution, step, min_side, max_side)
    square = resolution // step * step
    buckets = {(square, square)} if lowest <= square <= highest else set()
    for width in range(lowest, highest + 1, step):
        height = min(resolution**2 // width // step * step, highest)
        if height >= lowest:
            buckets |= {(width, height), (height, width)}
    if not buckets:
        raise UserError(
            f"no bucket of {resolution}x{resolution} pixels has sides between {lowest} and "
            f"{highest} in steps of {step}: lower the smallest side or the step"
        )
    return sorted(buckets)


def assign(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest, by the difference of the ratios' logarithms.

    The logarithm treats portrait and landscape alike: the transposed picture gets the transposed
    bucket. Of equally near buckets the one nearest to a square is taken, then the largest, then
    the widest (which only a square picture between two transposes can need).
    """
    wide, high = _nearest(np.array([[width, height]]), buckets)[0]
    return int(wide), int(high)


def _nearest(pictures: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """`assign` for each of the pictures (n, 2): int32 (n, 2).

    Between two neighbouring ratios their geometric mean is the border. Squares of ratios are
    compared, which are rational: where floating point is too near to call, whole numbers decide.
    """
    best: dict[Fraction, Size] = {}  # of each ratio, the largest
    for bucket in sorted(buckets):
        best[Fraction(*bucket)] = bucket
    rising = [best[ratio] for ratio in sorted(best)]
    means = [Fraction(*one) * Fraction(*other) for one, other in pairwise(rising)]
    limits = np.array([float(mean) for mean in means])
    ratios = (pictures[:, 0] / pictures[:, 1]) ** 2
    places = np.searchsorted(limits * (1 + ROUNDING), ratios)
    near = np.flatnonzero(np.searchsorted(limits * (1 - ROUNDING), ratios) != places)
    for at in np.unique(places[near]):
        undecided = near[places[near] == at]
        wide, high = pictures[undecided].T.astype(object)
        left, right = wide**2 * means[at].denominator, high**2 * means[at].numerator
        tied = _preference(rising[at + 1]) < _preference(rising[at])
        places[undecided] += (left > right) | ((left == right) & tied)
    return np.array(rising, dtype=np.int32)[places]


def _preference(bucket: Size) -> tuple[Fraction, int, int]:
    ratio = Fraction(*bucket)
    return max(ratio, 1 / ratio), -bucket[0] * bucket[1], -bucket[0]


def _inside(pictures: np.ndarray, resolution: int, step: int, longest: int) -> np.ndarray:
    """The largest sizes in steps that lie inside the pictures, the area and the longest side."""
    assert (pictures >= step).all(), "pictures that are too small were to be left out"
    floored = (pictures // step * step).astype(np.int64)
    short = np.minimum(floored.min(axis=1), longest)
    long = np.minimum(floored.max(axis=1), resolution**2 // short // step * step)
    long = np.minimum(long, longest)
    upright = pictures[:, 0] < pictures[:, 1]
    return np.stack([np.where(upright, short, long), np.where(upright, long, short)], axis=1)


def _limits(
    resolution: int, step: int, min_side: int | None, max_side: int | None
) -> tuple[int, int]:
    """The shortest and the longest side in steps."""
    lowest = resolution // 2 // step * step if min_side is None else _up(min_side, step)
    return max(step, lowest), (2 * resolution if max_side is None else max_side) // step * step


def _up(side: int, step: int) -> int:
    return -(-side // step) * step
