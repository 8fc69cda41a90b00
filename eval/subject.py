"""How faithful pictures are to a subject, on any picture features: CLIP-I and DINO, prior
preservation and diversity.

The measures of DreamBooth (Ruiz et al. 2023, arXiv:2208.12242, section 4): CLIP-I and DINO are the
same mean of cosines on other features. Rows of features need not have unit length.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def unit(features: np.ndarray) -> np.ndarray:
    """Rows (N, d) at unit length, float64; a row of zeros stays one, and is unlike all others.

    Raises ValueError for another shape, and for NaN or infinity.
    """
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features are of shape {rows.shape}, not (pictures, dimension)")
    if wrong := int((~np.isfinite(rows)).any(1).sum()):
        raise ValueError(f"{wrong} of {len(rows)} pictures have features that are not finite")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def likeness(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean cosine of each generated picture (N, d) to all real ones of the subject (M, d): (N,).

    CLIP-I or DINO by the features; the published number is the mean over all subjects and prompts.
    """
    return unit(generated) @ _mean(unit(real))


def real_likeness(real: np.ndarray) -> np.ndarray:
    """Mean cosine of each real picture (M, d) to the others: (M,), the ceiling of `likeness`.

    A picture is not compared with itself. Raises ValueError for fewer than two.
    """
    rows = unit(real)
    if len(rows) < 2:
        raise ValueError("real_likeness needs at least two real pictures")
    cosines = rows @ rows.T
    return (cosines.sum(1) - np.diag(cosines)) / (len(rows) - 1)


def prior_preservation(class_pictures: np.ndarray, real: np.ndarray) -> np.ndarray:
    """PRES of each picture (N, d) that the fine-tuned model made of the class, without the
    subject's name, by the subject's real pictures (M, d): (N,), the less the better.

    The same mean as `likeness`: much of it means that any dog has become this dog. What the base
    has is the number to compare with: a subject is like its class from the start.
    """
    return likeness(class_pictures, real)


def diversity(generated: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Mean of 1 - cosine over the pairs of pictures of one prompt: (G,), by first appearance.

    generated (N, d); groups: the prompt of each. NaN for a prompt with a single picture. The paper
    (DIV) takes LPIPS for the distance; these are features of whole pictures, so numbers differ.
    """
    rows, indices = unit(generated), members(groups)
    if len(groups) != len(rows):
        raise ValueError(f"{len(rows)} pictures and {len(groups)} prompts")
    return np.array([_mean_distance(rows[index]) for index in indices.values()])


def members(groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Which rows each group has, groups by first appearance."""
    found: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(group, []).append(index)
    return found


def _mean_distance(rows: np.ndarray) -> float:
    count = len(rows)
    if count < 2:
        return float("nan")
    cosines = rows @ rows.T
    return 1 - float(cosines.sum() - np.trace(cosines)) / (count * (count - 1))


def _mean(rows: np.ndarray) -> np.ndarray:
    if not len(rows):
        raise ValueError("likeness needs at least one real picture")
    return rows.mean(0)
