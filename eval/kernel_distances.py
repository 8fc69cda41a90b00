"""Maximum mean discrepancies of features: KID and CMMD, with their standard errors.

Unlike FID they have unbiased estimators, so sets of any size compare. MMD^2 of a kernel k between
P and Q is E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al., 2012, JMLR 13). Everything is
float64, a block of rows at a time: no N x N matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eval.clip_score import unit
from eval.estimate import Estimate
from train.config import UserError

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From features (N, d) and (M, d) to (N, M)."""
Labels = Sequence[int] | np.ndarray | None
"""One per row: rows of one label (say the prompt) depend on each other. None: all are independent.
"""

_BLOCK = 1 << 21  # numbers held at once: 16 MiB
_SIGMA = 10.0  # of CMMD's Gaussian


def polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KID's kernel (x.y / d + 1)^3 (Binkowski et al., 2018, arXiv:1801.01401, sec. 4)."""
    values = a @ b.T
    values /= a.shape[1]
    values += 1.0
    values *= values * values
    return values


def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CMMD's kernel, 1000 exp(-|x - y|^2 / 200), of features of length one, less its value at
    x = y (Jayasumana et al., 2024, arXiv:2401.09603, sec. 4).

    A constant makes no difference to an MMD; without it, small ones keep their digits.
    """
    values = a @ b.T
    values -= 1.0  # -|x - y|^2 / 2
    values /= _SIGMA**2
    np.expm1(values, out=values)
    values *= 1000.0
    return values


def kid(
    a: np.ndarray, b: np.ndarray, *, groups: Labels = None, groups_of_b: Labels = None
) -> Estimate:
    """KID of features (N, d) and (M, d): the unbiased estimator over all pairs, and its error.

    Zero on average between samples of one distribution, so sometimes below. `kid_subsets` is the
    published average over random subsets: it estimates the same, from a part of the pairs.
    """
    return mmd(a, b, polynomial).estimate(groups, groups_of_b)


def kid_change(
    before: np.ndarray,
    after: np.ndarray,
    reference: np.ndarray,
    *,
    groups: Labels = None,
    reference_groups: Labels = None,
) -> Estimate:
    """KID of `after` less KID of `before`, (N, d) each and row by row of the same prompts."""
    both = mmd(before, reference, polynomial), mmd(after, reference, polynomial)
    return change(*both, groups, reference_groups)


def kid_subsets(
    a: np.ndarray, b: np.ndarray, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID as published: mean and standard deviation of the estimator over random subsets of each.

    The deviation is that of one subset; it is no standard error. Smaller sets are taken whole.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size, rng = min(subset_size, len(a), len(b)), np.random.default_rng(seed)
    values = [
        mmd(a[rng.permutation(len(a))[:size]], b[rng.permutation(len(b))[:size]], polynomial)
        for _ in range(subsets)
    ]
    unbiased = [value.unbiased for value in values]
    return float(np.mean(unbiased)), float(np.std(unbiased))


class Cmmd(NamedTuple):
    """Both estimators; the published figures are of the biased one."""

    biased: float
    unbiased: float


def cmmd(a: np.ndarray, b: np.ndarray) -> Cmmd:
    """CMMD of CLIP embeddings (N, d) and (M, d) of any length, in its units of 1/1000."""
    result = mmd(unit(a), unit(b), gaussian)
    return Cmmd(result.biased, result.unbiased)


def cmmd_estimate(
    a: np.ndarray, b: np.ndarray, *, groups: Labels = None, groups_of_b: Labels = None
) -> Estimate:
    """The unbiased CMMD with its standard error."""
    return mmd(unit(a), unit(b), gaussian).estimate(groups, groups_of_b)


def cmmd_change(
    before: np.ndarray,
    after: np.ndarray,
    reference: np.ndarray,
    *,
    groups: Labels = None,
    reference_groups: Labels = None,
) -> Estimate:
    """CMMD of `after` less CMMD of `before`, (N, d) each and row by row of the same prompts."""
    reference = unit(reference)
    both = mmd(unit(before), reference, gaussian), mmd(unit(after), reference, gaussian)
    return change(*both, groups, reference_groups)


@dataclass(frozen=True)
class Discrepancy:
    """MMD^2 of two sets, and what its standard error is made of."""

    biased: float
    """With each sample paired with itself too."""
    unbiased: float
    by_a: np.ndarray
    """How much each row (N,) of the first set moves the unbiased value."""
    by_b: np.ndarray
    """(M,), of the second."""

    def estimate(self, groups: Labels = None, groups_of_b: Labels = None) -> Estimate:
        """The unbiased value with its standard error, NaN where all rows of a set have one label.

        It is the jackknife's: what each row contributes, and those of one label together. That has
        the variance of pairs twice (Efron & Stein, 1981), so it is right where the sets differ and
        up to 1.41 times too wide where they do not. Taking it off once would be unbiased, but then
        intervals of few pictures hold the truth too seldom: errors and values go together.
        """
        return _estimate(self.unbiased, self.by_a, self.by_b, groups, groups_of_b)


def change(
    before: Discrepancy, after: Discrepancy, groups: Labels = None, groups_of_b: Labels = None
) -> Estimate:
    """Their difference, of first sets with the same prompts row by row and one second set.

    What the prompts and the second set do to both alike drops out of the error.
    """
    by_a, by_b = after.by_a - before.by_a, after.by_b - before.by_b
    return _estimate(after.unbiased - before.unbiased, by_a, by_b, groups, groups_of_b)


def mmd(a: np.ndarray, b: np.ndarray, kernel: Kernel) -> Discrepancy:
    """MMD^2 of features (N, d) and (M, d) under a kernel; UserError below two rows each,
    ValueError for values that are not finite."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features are {a.shape} and {b.shape}, expected (N, d) and (M, d)")
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise UserError(f"KID and CMMD need at least 2 pictures a side, not {n} and {m}: use more")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold NaN or infinity: check the pictures and extractor")
    aa, bb, ab = _within(a, kernel), _within(b, kernel), _between(a, b, kernel)
    sum_aa, sum_bb, across = aa.rows.sum(), bb.rows.sum(), 2 * ab.rows.sum() / (n * m)
    unbiased = sum_aa / (n * (n - 1)) + sum_bb / (m * (m - 1)) - across
    biased = (sum_aa + aa.diagonal) / n**2 + (sum_bb + bb.diagonal) / m**2 - across
    return Discrepancy(
        biased=float(biased),
        unbiased=float(unbiased),
        by_a=_centred(aa.rows / (n - 1) - ab.rows / m) * 2 / n,
        by_b=_centred(bb.rows / (m - 1) - ab.columns / n) * 2 / m,
    )


class _Within(NamedTuple):
    """Sums of a kernel matrix (N, N): over each row without the diagonal, and of the diagonal."""

    rows: np.ndarray
    diagonal: float


class _Between(NamedTuple):
    """Sums of a kernel matrix (N, M) over its rows (N,) and columns (M,)."""

    rows: np.ndarray
    columns: np.ndarray


def _within(features: np.ndarray, kernel: Kernel) -> _Within:
    """From the diagonal to the right, as the matrix is symmetric."""
    sums, diagonal = np.zeros(len(features)), 0.0
    for start, stop in _blocks(len(features), len(features)):
        values = kernel(features[start:stop], features[start:])
        diagonal += float(np.trace(values))
        np.fill_diagonal(values, 0.0)
        sums[start:stop] += values.sum(axis=1)
        sums[stop:] += values[:, stop - start :].sum(axis=0)
    return _Within(sums, diagonal)


def _between(a: np.ndarray, b: np.ndarray, kernel: Kernel) -> _Between:
    rows, columns = np.zeros(len(a)), np.zeros(len(b))
    for start, stop in _blocks(len(a), len(b)):
        values = kernel(a[start:stop], b)
        rows[start:stop] = values.sum(axis=1)
        columns += values.sum(axis=0)
    return _Between(rows, columns)


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _estimate(
    value: float, by_a: np.ndarray, by_b: np.ndarray, groups: Labels, groups_of_b: Labels
) -> Estimate:
    """With the error of the sum of what rows contribute, those of one label together; NaN for a
    single label."""
    labels, of_b = _labels(groups, groups_of_b, len(by_a), len(by_b))
    by_a, by_b = by_a * _small_sample(labels), by_b * _small_sample(of_b)
    _, index = np.unique(np.concatenate([labels, of_b]), return_inverse=True)
    sums = np.bincount(index, weights=np.concatenate([by_a, by_b]))
    freedom = min(len(np.unique(labels)), len(np.unique(of_b))) - 1
    return Estimate(value, float(np.sqrt((sums**2).sum())), freedom)


def _labels(a: Labels, b: Labels, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """One label per row, where none are given one that no other row has."""
    labels, of_b = (None if given is None else np.asarray(given) for given in (a, b))
    if labels is None:
        labels = np.arange(n) + (0 if of_b is None else of_b.max() + 1)
    if of_b is None:
        of_b = np.arange(m) + labels.max() + 1
    if len(labels) != n or len(of_b) != m:
        raise ValueError(f"{len(labels)} and {len(of_b)} labels of {n} and {m} rows")
    return labels, of_b


def _small_sample(labels: np.ndarray) -> float:
    """What makes the variance between so few labels unbiased, as a factor of the contributions."""
    count = len(np.unique(labels))
    return float(np.sqrt(count / (count - 1))) if count > 1 else float("nan")


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()
