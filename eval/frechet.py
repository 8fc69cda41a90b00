"""The Fréchet distance between two sets of features, its small-sample bias and its spread.

FID (Heusel et al., 2017, arXiv:1706.08500, eq. 6) is this distance on image features:
|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Everything here is float64 on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import UserError


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
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(f"features are {features.shape}, expected (N, {self.dimension})")
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinity: check the pictures and extractor")
        if not len(features):
            return
        batch = Moments(self.dimension)
        batch.n, batch.mean = len(features), features.mean(axis=0)
        centred = features - batch.mean
        batch.m2 = centred.T @ centred
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Take in what another process or batch gathered."""
        if other.dimension != self.dimension:
            raise ValueError(f"cannot merge {other.dimension} with {self.dimension} dimensions")
        if not other.n:
            return
        n = self.n + other.n
        shift = other.mean - self.mean
        self.mean = self.mean + shift * (other.n / n)
        self.m2 = self.m2 + other.m2 + np.outer(shift, shift) * (self.n * other.n / n)
        self.n = n

    def save(self, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Write safetensors; `metadata` (say extractor, fingerprint, resize) goes in the header."""
        from safetensors.numpy import save_file

        header = {"n": json.dumps(self.n), "metadata": json.dumps(metadata or {})}
        save_file({"mean": self.mean, "m2": self.m2}, str(path), metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> tuple[Moments, dict[str, Any]]:
        """The moments and the metadata that `save` wrote."""
        from safetensors import safe_open

        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            if "n" not in header or set(file.keys()) != {"mean", "m2"}:
                raise UserError(f"{path} is not a statistics file of eval/frechet.py: remake it")
            moments = cls(0)
            moments.n = int(json.loads(header["n"]))
            moments.mean, moments.m2 = file.get_tensor("mean"), file.get_tensor("m2")
            return moments, json.loads(header["metadata"])


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of the Gaussians with these moments.

    tr (S1 S2)^(1/2) is taken as tr (R S2 R)^(1/2) with R = S1^(1/2): symmetric, so real and stable
    where a general matrix root is not. Equal sets may give about -1e-5; that is not hidden.
    """
    root = _root(a.cov)
    eigenvalues = np.linalg.eigvalsh(root @ b.cov @ root)
    cross = np.sqrt(eigenvalues.clip(min=0.0)).sum()
    offset = a.mean - b.mean
    return float(offset @ offset + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross)


def frechet_from_features(a: np.ndarray, b: np.ndarray) -> float:
    """The same distance from features (N, d) and (M, d), by the cheaper of two exact routes.

    With fewer samples than dimensions, tr (S1 S2)^(1/2) is the nuclear norm of A B^T, where A and B
    are the centred features over sqrt(n - 1): an N x M matrix in place of d x d ones.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if min(len(a), len(b)) >= a.shape[1]:
        return frechet_distance(Moments.of(a), Moments.of(b))
    if min(len(a), len(b)) < 2:
        raise UserError("a Fréchet distance needs at least 2 pictures in each set: use more")
    offset = a.mean(axis=0) - b.mean(axis=0)
    a = (a - a.mean(axis=0)) / np.sqrt(len(a) - 1)
    b = (b - b.mean(axis=0)) / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(offset @ offset + (a * a).sum() + (b * b).sum() - 2.0 * cross)


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
        f"FID is measured on {smaller} pictures in {dimension} dimensions: its value is mostly "
        f"small-sample bias. Compare only numbers of equal counts, and use at least {dimension} "
        "pictures for a value to quote."
    )


def bootstrap(
    reference: np.ndarray,
    *generated: np.ndarray,
    groups: Sequence[int] | None = None,
    reference_groups: Sequence[int] | None = None,
    resamples: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Distances (resamples, len(generated)) of resampled sets (N, d) to the reference (M, d).

    Every generated set is resampled alike, so columns are paired. Whole groups are drawn, one label
    per row: say the prompt. Where a group has reference pictures too (the prompt is their caption)
    they are drawn with it, as they share its content. Without labels all rows are independent.

    A naive bootstrap of this distance is biased upward, as repeated rows lower the covariance's
    rank: use it for the spread, never for the centre.
    """
    rng = np.random.default_rng(seed)
    n, m = len(generated[0]), len(reference)
    labels = np.arange(n) if groups is None else np.asarray(groups)
    of_reference = np.arange(n, n + m) if reference_groups is None else np.asarray(reference_groups)
    alone = np.setdiff1d(of_reference, labels)
    rows, rows_of_reference = _members(labels), _members(of_reference)
    distances = np.empty((resamples, len(generated)))
    for distance in distances:
        drawn = rng.choice(list(rows), size=len(rows))
        others = rng.choice(alone, size=len(alone)) if len(alone) else alone
        chosen = _gather(rows, drawn)
        against = reference[_gather(rows_of_reference, np.concatenate([drawn, others]))]
        distance[:] = [frechet_from_features(features[chosen], against) for features in generated]
    return distances


def _members(labels: np.ndarray) -> dict[int, np.ndarray]:
    return {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}


def _gather(members: dict[int, np.ndarray], drawn: np.ndarray) -> np.ndarray:
    return np.concatenate([members[int(k)] for k in drawn if int(k) in members])


def _root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
