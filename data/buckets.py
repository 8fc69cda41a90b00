"""Aspect buckets: the few sizes that pictures are brought to, so that they can share a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.images import Size, fit_geometry
from train.config import UserError

if TYPE_CHECKING:
    from data.sources import Record


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
    lowest = max(step, resolution // 2 // step * step if min_side is None else _up(min_side, step))
    highest = (2 * resolution if max_side is None else max_side) // step * step
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
    wanted = _log_ratio(width, height)

    def distance(bucket: Size) -> tuple[float, float, int, int]:
        ratio = _log_ratio(*bucket)
        area = bucket[0] * bucket[1]
        return round(abs(wanted - ratio), 9), round(abs(ratio), 9), -area, -bucket[0]

    return min(buckets, key=distance)


def _log_ratio(width: int, height: int) -> float:
    return math.log(width) - math.log(height)


def _up(side: int, step: int) -> int:
    return -(-side // step) * step


@dataclass(frozen=True)
class BucketRow:
    """What one bucket holds: `cropped` is the mean share of pixels lost, from 0 to 1."""

    size: Size
    images: int
    cropped: float
    enlarged: int  # images smaller than the bucket, which are scaled up


def bucket_table(records: Sequence[Record], sizes: Sequence[Size]) -> list[BucketRow]:
    """One row per bucket in use, largest first, for a person to read."""
    members: dict[Size, list[Record]] = {}
    for record, size in zip(records, sizes, strict=True):
        members.setdefault(size, []).append(record)
    rows = [_row(size, inside) for size, inside in members.items()]
    return sorted(rows, key=lambda row: (-row.images, row.size))


def _row(size: Size, records: list[Record]) -> BucketRow:
    fits = [fit_geometry(record.width, record.height, size) for record in records]
    cropped = sum(fit.cropped for fit in fits) / len(fits)
    return BucketRow(size, len(fits), cropped, sum(fit.scale > 1 for fit in fits))
