"""How varied a set of pictures is, of itself: inception score and Vendi score."""

from __future__ import annotations

import numpy as np

from eval.clip_score import unit
from train.config import UserError


def inception_score(probabilities: np.ndarray, splits: int = 1) -> float:
    """exp of the mean divergence of each picture's class probabilities (N, K) from their mean.

    From 1 (all alike, or all unsure) to K (sure, and all classes equally often): Salimans et al.,
    2016, arXiv:1606.03498, sec. 4. With splits, the mean over so many parts in the order given; 10
    of 5,000 pictures each are the published convention.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if (
        probabilities.ndim != 2
        or not (probabilities >= 0).all()
        or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-4)
    ):
        raise ValueError("inception_score wants rows (N, K) of probabilities that sum to 1")
    if not 1 <= splits <= len(probabilities):
        raise UserError(f"splits={splits} of {len(probabilities)} pictures: use fewer splits")
    return float(np.mean([_score(part) for part in np.array_split(probabilities, splits)]))


def vendi_score(features: np.ndarray) -> float:
    """How many different pictures the features (N, d) amount to, from 1 to N.

    exp of the entropy of the eigenvalues of K / N, with K the cosines of all pairs: Friedman &
    Dieng, 2023, arXiv:2210.02410, def. 3.1. It grows with N: compare only sets of equal sizes.
    """
    if not len(features):
        raise UserError("there are no pictures to take a Vendi score of: use at least 1")
    rows = unit(features)
    n, d = rows.shape
    gram = rows.T @ rows if n > d else rows @ rows.T  # the same eigenvalues but for zeros
    return float(np.exp(_entropy(np.linalg.eigvalsh(gram / n).clip(min=0.0))))


def _score(probabilities: np.ndarray) -> float:
    """The divergence's mean is the entropy of the mean less the mean entropy."""
    mean = probabilities.mean(axis=0)
    return float(np.exp(_entropy(mean) - _entropy(probabilities) / len(probabilities)))


def _entropy(probabilities: np.ndarray) -> float:
    """Of all the numbers given, in nats; 0 log 0 is 0."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
