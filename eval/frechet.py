"""The Fréchet distance between two sets of features, its small-sample bias and FID-infinity.

FID (Heusel et al., 2017, arXiv:1706.08500, eq. 6) is this distance on image features:
|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Everything here is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.estimate import Estimate
from eval.moments import Moments, chunks
from train.config import UserError

_LEAST_PART = 1.5  # pictures per dimension; far below, FID leaves its straight line in 1 / N
_LEAST_PARTS = 4  # fewer do not show whether it is straight


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of the Gaussians with these moments.

    tr (S1 S2)^(1/2) is taken as tr (F^T S2 F)^(1/2) with F F^T = S1: symmetric, so real and stable
    where a general matrix root is not. Equal sets may give about -1e-5; that is not hidden.
    """
    few, many = (a, b) if a.n <= b.n else (b, a)
    factor = _factor(few)
    cross = _sum_of_roots(factor.T @ (many.cov @ factor))
    offset = a.mean - b.mean
    return float(offset @ offset + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross)


def frechet_from_features(a: np.ndarray | Moments, b: np.ndarray | Moments) -> float:
    """The same distance from features (N, d), of which one may be moments, by the cheapest route.

    With fewer samples than dimensions, tr (S1 S2)^(1/2) is the nuclear norm of A B^T, where A and B
    are the centred features over sqrt(n - 1): an N x M matrix in place of d x d ones. Where B is
    only known by its moments, it is tr (A S2 A^T)^(1/2), an N x N matrix.
    """
    if isinstance(a, Moments):
        a, b = b, a
    if isinstance(a, Moments):
        return frechet_distance(a, b if isinstance(b, Moments) else Moments.of(b))
    a = np.asarray(a, dtype=np.float64)
    if isinstance(b, Moments):
        return _to_moments(a, b)
    b = np.asarray(b, dtype=np.float64)
    if min(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(Moments.of(a), Moments.of(b))
    return _FewSamples(a, b).distance(np.arange(len(a)), np.arange(len(b)))


def fid_infinity(
    features: np.ndarray,
    reference: np.ndarray | Moments,
    *,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    points: int = 15,
) -> Estimate:
    """The distance of features (N, d) to the reference, extrapolated to N = infinity.

    FID falls on a straight line in 1 / N (Chong & Forsyth, 2020, arXiv:1911.07023). It is taken on
    `points` subsets: the whole, and all parts of random cuts into 2, 3, ... equal ones. Parts have
    1.5 pictures per dimension or more; UserError where there are not pictures for four such parts.

    The standard error is that of the distance's linear part over the labels in `groups` (N,), say
    the prompts, or else over the pictures, and beside it what a parabola would give in place of the
    line. It is for the reference as it is: the reference's own bias stays, as in the paper. It errs
    to the wide side for sets nearly alike.
    """
    features = np.asarray(features, dtype=np.float64)
    reference = reference if isinstance(reference, Moments) else Moments.of(reference)
    whole, rng = Moments.of(features), np.random.default_rng(seed)
    value, rises = frechet_distance(whole, reference), []
    for parts in range(2, 1 + _most_parts(len(features), features.shape[1], points)):
        pieces = np.array_split(rng.permutation(len(features)), parts)
        of_parts = [frechet_distance(Moments.of(features[rows]), reference) for rows in pieces]
        rises.append(float(np.mean(of_parts)) - value)
    straight, bent = _slopes(np.array(rises))
    sampled, count = _error(_influence(features, whole, reference), groups)
    return Estimate(value - straight, float(np.hypot(sampled, straight - bent)), count - 1)


def expected_bias(spectrum: int | np.ndarray, n: int, m: int | None = None) -> float:
    """What the distance is expected to be between n and m samples of one and the same Gaussian.

    `spectrum`: eigenvalues of its covariance, or the dimension d for the identity; m defaults to n.
    Leading order in 1/n, so right for n well above d and a rough guide below. The mean contributes
    tr S, the covariance the Bures metric's 1/2 sum_ij E_ij^2 / (l_i + l_j) at a Wishart deviation
    E; for the identity and m = n this is (2d + d(d+1)/2) / n.
    """
    values = np.ones(spectrum) if isinstance(spectrum, int) else np.asarray(spectrum, np.float64)
    values = values[values > 0]
    pairs = np.outer(values, values) / np.add.outer(values, values)
    per_sample = values.sum() + 0.5 * (pairs.sum() + 0.5 * values.sum())
    return float(per_sample * (1.0 / n + 1.0 / (m or n)))


def small_sample_warning(dimension: int, n: int, m: int) -> str | None:
    """One sentence if either set is smaller than the features' dimension, else None."""
    smaller = min(n, m)
    if smaller >= dimension:
        return None
    return (
        f"FID is measured on {n} and {m} pictures in {dimension} dimensions: its value is mostly "
        f"small-sample bias. Compare only numbers of equal counts, and use at least {dimension} "
        "pictures for a value to quote."
    )


class _FewSamples:
    """Distances between rows of two sets, from inner products that are taken once."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        if min(len(a), len(b)) < 2:
            raise UserError("a Fréchet distance needs at least 2 pictures in each set: use more")
        centre = b.mean(axis=0)
        self.a, self.b = a - centre, b - centre
        self.products = self.a @ self.b.T  # (N, M)

    def distance(self, rows_a: np.ndarray, rows_b: np.ndarray) -> float:
        """Of the rows with these indices, each once."""
        a, b = self.a[rows_a], self.b[rows_b]
        mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
        products = self.products[np.ix_(rows_a, rows_b)]
        centred = products - products.mean(axis=1)[:, None] - products.mean(axis=0)
        centred += products.mean()
        by_a, by_b = len(a) - 1, len(b) - 1
        cross = np.linalg.svd(centred, compute_uv=False).sum() / np.sqrt(by_a * by_b)
        traces = ((a - mean_a) ** 2).sum() / by_a + ((b - mean_b) ** 2).sum() / by_b
        offset = mean_a - mean_b
        return float(offset @ offset + traces - 2.0 * cross)


class _ManySamples:
    """The same by the moments, which cost less where there are more samples than dimensions."""

    def __init__(self, a: np.ndarray, b: np.ndarray) -> None:
        self.a, self.b = a, b

    def distance(self, rows_a: np.ndarray, rows_b: np.ndarray) -> float:
        return frechet_distance(Moments.of(self.a[rows_a]), Moments.of(self.b[rows_b]))


def route(a: np.ndarray, b: np.ndarray) -> _FewSamples | _ManySamples:
    """The cheaper way to the distances of many parts of features (N, d) and (M, d)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    few = min(len(a), len(b)) < a.shape[1]
    return _FewSamples(a, b) if few else _ManySamples(a, b)


def _to_moments(features: np.ndarray, reference: Moments) -> float:
    n, d = features.shape
    if n >= d or n < 2:
        return frechet_distance(Moments.of(features), reference)
    mean = features.mean(axis=0)
    centred = (features - mean) / np.sqrt(n - 1)
    cross = _sum_of_roots(centred @ (reference.cov @ centred.T))
    offset = mean - reference.mean
    traces = (centred * centred).sum() + np.trace(reference.cov)
    return float(offset @ offset + traces - 2.0 * cross)


def _most_parts(n: int, dimension: int, points: int) -> int:
    """Into how many parts to cut, with 1 + 2 + ... of them in all."""
    least = int(np.ceil(_LEAST_PART * dimension))
    if n < _LEAST_PARTS * least:
        raise UserError(
            f"FID-infinity cannot be told from {n} pictures in {dimension} dimensions: it needs at "
            f"least {_LEAST_PARTS * least}; use more pictures, or look at KID and CMMD"
        )
    affordable = int((np.sqrt(8 * points + 1) - 1) / 2)
    return max(3, min(n // least, affordable))


def _slopes(rises: np.ndarray) -> tuple[float, float]:
    """From the mean distances of 2, 3, ... parts, less that of the whole: the slope in parts of the
    line through the whole, and of the parabola at the other end, between none and one.

    The rise of k parts varies as k - 1, beyond what all cuts share (they hold the same pictures):
    the least squares are weighted by its inverse.
    """
    more = np.arange(1, len(rises) + 1)  # parts, less one
    slopes = rises / more
    straight, centre = np.average(slopes, weights=more), np.average(more, weights=more)
    away = more - centre
    bend = (more * away * slopes).sum() / (more * away**2).sum()
    return float(straight), float(straight - bend * (centre + 1))


def _influence(features: np.ndarray, whole: Moments, reference: Moments) -> np.ndarray:
    """How much each picture (N,) moves the distance, times N, up to a constant.

    The distance's derivative by S1 is I - T, T being the optimal transport between the Gaussians.
    """
    factor = _factor(reference)
    values, vectors = np.linalg.eigh(factor.T @ (whole.cov @ factor))
    kept = values > _noise(values)
    root = factor @ (vectors[:, kept] * values[kept] ** -0.25)  # (d, r): T = root root^T
    offset, influence = whole.mean - reference.mean, []
    for rows in chunks(features):
        centred = rows - whole.mean
        influence.append(2 * centred @ offset + (centred**2).sum(axis=1))
        influence[-1] -= ((centred @ root) ** 2).sum(axis=1)
    return np.concatenate(influence)


def _error(influence: np.ndarray, groups: Sequence[int] | None) -> tuple[float, int]:
    """The standard error of the mean of influences (N,), those of one label together, and of how
    many labels it is; NaN of one."""
    centred = (influence - influence.mean()) / len(influence)
    labels = range(len(influence)) if groups is None else groups
    _, index = np.unique(np.asarray(labels), return_inverse=True)
    sums = np.bincount(index, weights=centred)
    count = len(sums)
    return float(np.sqrt((sums**2).sum() * count / (count - 1))) if count > 1 else np.nan, count


def _factor(moments: Moments) -> np.ndarray:
    """F (d, r) with F F^T the covariance: Cholesky's where it has full rank, else by `eigh`."""
    cov = moments.cov
    if moments.n > moments.dimension:
        try:
            return np.linalg.cholesky(cov)
        except np.linalg.LinAlgError:
            pass
    values, vectors = np.linalg.eigh(cov)
    kept = values > _noise(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _noise(values: np.ndarray) -> float:
    """Eigenvalues up to here may be rounding of 0."""
    return (
        float(len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)) if len(values) else 0
    )


def _sum_of_roots(symmetric: np.ndarray) -> float:
    return float(np.sqrt(np.linalg.eigvalsh(symmetric).clip(min=0.0)).sum())
