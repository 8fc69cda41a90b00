"""The mean and covariance of features, gathered batch by batch and process by process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from train.config import UserError

_ROWS = 1024  # taken in at once: of 2,048 dimensions, 16 MiB


class Moments:
    """Count, mean (d,) and centred second moment (d, d) of features, gathered batch by batch.

    Batches and processes merge by Chan, Golub & LeVeque (1983), which keeps its digits where sums
    of raw squares lose them (features far from zero).
    """

    def __init__(self, dimension: int) -> None:
        self.n = 0
        self.mean = np.zeros(dimension)
        self.m2 = np.zeros((dimension, dimension))

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """The moments of one array (N, d)."""
        moments = cls(np.asarray(features).shape[-1])
        moments.update(features)
        return moments

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> np.ndarray:
        """The unbiased covariance (d, d); needs two samples or more."""
        if self.n < 2:
            raise UserError(
                f"a covariance needs at least 2 pictures, there are {self.n}: use more pictures"
            )
        return self.m2 / (self.n - 1)

    def update(self, features: np.ndarray) -> None:
        """Take in features (N, d); ValueError for another shape or a value that is not finite."""
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"features are {features.shape}, expected (N, {self.dimension})")
        if not all(np.isfinite(rows).all() for rows in chunks(features)):
            raise ValueError("features hold NaN or infinity: check the pictures and extractor")
        for rows in chunks(features):
            self._take(np.asarray(rows, dtype=np.float64))

    def merge(self, other: Moments) -> None:
        """Take in what another process or batch gathered."""
        if other.dimension != self.dimension:
            raise ValueError(f"cannot merge {other.dimension} with {self.dimension} dimensions")
        if not other.n:
            return
        n, shift = self.n + other.n, other.mean - self.mean
        self.m2 += other.m2
        self.m2 += np.outer(shift * (self.n * other.n / n), shift)
        self.mean += shift * (other.n / n)
        self.n = n

    def _take(self, rows: np.ndarray) -> None:
        mean = rows.mean(axis=0)
        n, shift = self.n + len(rows), mean - self.mean
        # The shift of the mean as one row more spares a second (d, d) product.
        centred = np.vstack([rows - mean, shift * np.sqrt(self.n * len(rows) / n)])
        self.m2 += centred.T @ centred
        self.mean += shift * (len(rows) / n)
        self.n = n


def chunks(features: np.ndarray) -> Iterator[np.ndarray]:
    """Features (N, d) in views of so many rows that their copies are small."""
    return (features[start : start + _ROWS] for start in range(0, len(features), _ROWS))
