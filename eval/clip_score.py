"""CLIP score: how well each picture matches its prompt.

The cosine of CLIP's image and text embeddings (Hessel et al., 2021, arXiv:2104.08718). Files hold
the raw cosine; what is shown is 100 x max(cos, 0), without the paper's factor 2.5.
"""

from __future__ import annotations

import numpy as np

from eval import subject

CONVENTION = "100 x max(cos, 0)"


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """The cosine (N,) of each picture (N, d) with its own prompt (N, d)."""
    if image_features.shape != text_features.shape:
        raise ValueError(f"pictures {image_features.shape}, prompts {text_features.shape}")
    return (unit(image_features) * unit(text_features)).sum(axis=1)


def unit(features: np.ndarray) -> np.ndarray:
    """Features (N, d) as float64 of length one; ValueError for a zero or non-finite row."""
    if not (np.isfinite(features).all() and np.any(features, axis=1).all()):
        raise ValueError("an embedding is zero or not finite: look at the pictures and the CLIP")
    return subject.unit(features)


def points(cosines: np.ndarray) -> np.ndarray:
    """Cosines in the shown convention, 100 x max(cos, 0), per sample."""
    return 100.0 * np.maximum(cosines, 0.0)
