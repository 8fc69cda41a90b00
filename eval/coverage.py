"""How much of each other two sets of features cover: precision, recall, density and coverage.

A set's support is taken as the balls around its samples that reach to their k-th nearest neighbour
within the set. Precision is the share of generated samples within the real support, recall that of
real ones within the generated (Kynkaanniemi et al., 2019, arXiv:1904.06991, eq. 1-2). Density
counts how many real balls hold a generated sample, over k, and coverage the share of real balls
that hold any; an outlier moves them less (Naeem et al., 2020, arXiv:2002.09797, sec. 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from train.config import UserError

_BLOCK = 1 << 22  # distances held at once: 32 MiB
_ROUNDING = 1e-12  # of a squared distance, relative to the largest square in it


class Coverage(NamedTuple):
    """All four, of one pass; precision, recall and coverage are shares, density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def coverage(real: np.ndarray, generated: np.ndarray, *, neighbours: int = 3) -> Coverage:
    """All four of generated features (M, d) against real ones (N, d).

    Balls are closed for precision and recall, open for density and coverage, as their authors'
    programs have them. UserError for sets no larger than the number of neighbours, ValueError for
    values that are not finite. All depend on the counts: compare only sets of equal sizes.
    """
    if not (np.isfinite(real).all() and np.isfinite(generated).all()):
        raise ValueError("features hold NaN or infinity: check the pictures and extractor")
    centre = np.mean(real, axis=0, dtype=np.float64)
    real, generated = real - centre, generated - centre  # without an offset no digits are lost
    radii = _radii(real, neighbours, "real")
    radii_generated = _radii(generated, neighbours, "generated")
    slack = _ROUNDING * max(np.square(real).sum(1).max(), np.square(generated).sum(1).max())
    in_real = np.zeros(len(generated), dtype=bool)
    covered, recalled, balls = [], [], 0
    for start, distances in _distances(real, generated):
        radius = radii[start : start + len(distances), None]
        in_real |= (distances <= radius + slack).any(axis=0)
        recalled.append((distances <= radii_generated + slack).any(axis=1))
        inside = distances < radius - slack
        covered.append(inside.any(axis=1))
        balls += int(inside.sum())
    return Coverage(
        precision=float(in_real.mean()),
        recall=float(np.concatenate(recalled).mean()),
        density=balls / (neighbours * len(generated)),
        coverage=float(np.concatenate(covered).mean()),
    )


def _radii(features: np.ndarray, neighbours: int, name: str) -> np.ndarray:
    """The squared distance (N,) of each row to its k-th nearest other row."""
    if len(features) <= neighbours:
        raise UserError(
            f"precision and recall by {neighbours} neighbours need more than {neighbours} "
            f"pictures, there are {len(features)} {name} ones: use more pictures"
        )
    radii = np.empty(len(features))
    for start, distances in _distances(features, features):
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf  # itself
        nearest = np.partition(distances, neighbours - 1, axis=1)
        radii[start : start + len(distances)] = nearest[:, neighbours - 1]
    return radii


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Squared distances of some rows of a (N, d) to all of b (M, d), and the first row's index."""
    of_b, step = np.square(b).sum(axis=1), max(1, _BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = a[start : start + step]
        distances = rows @ b.T
        distances *= -2.0
        distances += np.square(rows).sum(axis=1)[:, None]
        distances += of_b
        yield start, distances.clip(min=0.0, out=distances)
