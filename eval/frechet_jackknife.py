"""How sure Fréchet distances are, and the change from one to another, over blocks of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eval.estimate import Estimate
from eval.frechet import route


class Jackknife(NamedTuple):
    """Distances of several sets to one reference, and what their errors are made of."""

    distances: np.ndarray
    """(A,)"""
    parts: np.ndarray
    """(blocks, A): what each block of prompts adds to each distance, less the blocks' mean; the
    squares of a column add up to the distance's variance. NaN where that cannot be known."""
    freedom: int
    """Of the variance: of how many labels or blocks it is, less one."""

    def estimate(self, *weights: float) -> Estimate:
        """The sum of the distances by these weights: (0, 1) is the second, (-1, 1) their change,
        out of which drops what moves both alike."""
        value, parts = self.distances @ weights, self.parts @ np.array(weights)
        return Estimate(float(value), float(np.sqrt((parts**2).sum())), self.freedom)


def jackknife(
    reference: np.ndarray,
    *generated: np.ndarray,
    groups: Sequence[int] | None = None,
    reference_groups: Sequence[int] | None = None,
    blocks: int = 40,
) -> Jackknife:
    """Distances of sets (N, d), row by row of the same prompts, to the reference (M, d), again with
    each block of prompts left out (delete-a-group jackknife: Busing et al., 1999).

    Rows of one label, say the prompt, stay together, also those of the reference (the prompt is
    their caption): they share content. Without labels all rows are independent. A bootstrap of this
    distance is biased upward and wider, as repeated rows lower the covariance's rank.
    """
    n, m = len(generated[0]), len(reference)
    labels = np.arange(n) if groups is None else np.asarray(groups)
    of_reference = np.arange(n, n + m) if reference_groups is None else np.asarray(reference_groups)
    routes = [route(features, reference) for features in generated]

    def without(left_out: np.ndarray) -> tuple[float, np.ndarray]:
        """The share of the set that is left out, and the distances without it."""
        kept, against = ~np.isin(labels, left_out), ~np.isin(of_reference, left_out)
        rows, others = np.flatnonzero(kept), np.flatnonzero(against)
        share = 1 - (len(rows) / n if len(rows) < n else len(others) / m)
        few = min(len(rows), len(others)) < 2
        return share, np.array([np.nan if few else r.distance(rows, others) for r in routes])

    distances = np.array([route.distance(np.arange(n), np.arange(m)) for route in routes])
    count = min(len(np.unique(labels)), len(np.unique(of_reference)))
    parts = [np.full((1, len(routes)), np.nan)] if count < 2 else []
    for stratum in _strata(labels, of_reference) if count > 1 else ():
        cut = np.array_split(stratum, min(blocks, len(stratum)))
        shares, left = zip(*map(without, cut), strict=True)
        parts.append(_parts(np.array(shares)[:, None], distances - np.array(left)))
    return Jackknife(distances, np.concatenate(parts), min(count, blocks) - 1)


def _strata(labels: np.ndarray, of_reference: np.ndarray) -> Iterator[np.ndarray]:
    """Labels that are drawn together: the prompts, and captions of the reference that are none."""
    prompts, alone = np.unique(labels), np.setdiff1d(of_reference, labels)
    if min(len(prompts), len(alone)) == 1:  # the spread of one is not known: with the others
        yield np.concatenate([prompts, alone])
        return
    yield prompts
    if len(alone):
        yield alone


def _parts(shares: np.ndarray, fell: np.ndarray) -> np.ndarray:
    """What blocks of these shares (B, 1) of a set add to distances, from how far these fell (B, A)
    without them, so that squares add up to a variance.

    What every block adds by its size alone is the distance's small-sample bias.
    """
    added = (1 - shares) * fell
    added -= shares * (added.sum(axis=0) / shares.sum())
    return added * np.sqrt(len(added) / (len(added) - 1))
