"""CLIP score: how well each picture matches its prompt, and how sure the mean is.

The cosine of CLIP's image and text embeddings (Hessel et al., 2021, arXiv:2104.08718). Files hold
the raw cosine; what is shown is 100 x max(cos, 0), without the paper's factor 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CONVENTION = "100 x max(cos, 0)"


@dataclass(frozen=True)
class Summary:
    """A mean with its 95 % bootstrap interval; `n` values in `groups` groups."""

    mean: float
    low: float
    high: float
    n: int
    groups: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """The cosine (N,) of each picture (N, d) with its own prompt (N, d)."""
    if image_features.shape != text_features.shape:
        raise ValueError(f"pictures {image_features.shape}, prompts {text_features.shape}")
    return (unit(image_features) * unit(text_features)).sum(axis=1)


def unit(features: np.ndarray) -> np.ndarray:
    """Features (N, d) as float64 of length one; ValueError for a zero or non-finite row."""
    features = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError("an embedding is zero or not finite: look at the pictures and the CLIP")
    return features / norms


def points(cosines: np.ndarray) -> np.ndarray:
    """Cosines in the shown convention, 100 x max(cos, 0), per sample."""
    return 100.0 * np.maximum(cosines, 0.0)


def summarise(
    values: np.ndarray,
    groups: Sequence[int] | np.ndarray | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Summary:
    """The mean of values (N,) and the percentile interval of a bootstrap over groups.

    Pictures of one prompt are not independent: give `groups` (N,), one label per prompt, and whole
    prompts are drawn. Without it every value stands for itself.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("nothing to summarise")
    labels = np.arange(len(values)) if groups is None else np.asarray(groups)
    _, inverse = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(inverse, weights=values), np.bincount(inverse)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Summary(float(values.mean()), float(low), float(high), len(values), len(sums))
