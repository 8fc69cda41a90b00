"""What a model forgot: how far its pictures of general prompts moved from the base's.

Base and fine-tuned model are given the same prompts and seeds. A distance of features says nothing
by itself, so the base's own pictures of the same prompt by another seed are the yardstick: 0 is the
very same picture, 1 is as different as another seed makes it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.subject import members, unit

# Everyday scenes of many kinds; none is of a subject or a style that somebody fine-tunes for.
GENERAL = (
    "a bowl of oranges on a kitchen table",
    "a red bicycle leaning on a brick wall",
    "a lighthouse above a stormy sea",
    "two people walking under an umbrella in the rain",
    "a steam train crossing a stone bridge",
    "a cup of coffee beside an open book",
    "a market street with fruit stalls in the morning",
    "a wooden cabin in a snowy forest",
    "a portrait of an old fisherman",
    "a horse running over a meadow",
    "a desk with a lamp and a typewriter",
    "a sailing boat on a calm lake at sunset",
    "a child flying a kite on a hill",
    "a city skyline at night",
    "a vase of tulips by the window",
    "a waterfall in a green valley",
    "a plate of pancakes with blueberries",
    "an airplane above the clouds",
    "a guitar on an empty stage",
    "a flock of birds over a field of wheat",
    "a pair of leather boots on a doormat",
    "a castle on a cliff in the fog",
    "a crowded subway platform",
    "a watercolour painting of a garden",
)


_LEAST_SHARE = 0.01  # of what prompts change: a seed that changes less changes nothing
_ROUNDING = 1e-9  # of a cosine distance, of features in float32


@dataclass(frozen=True)
class Forgetting:
    """Cosine distances between pictures of the same prompt."""

    distances: np.ndarray
    """(N,): fine-tuned against base, by the same seed."""
    yardstick: float
    """Mean distance between the base's pictures of one prompt by different seeds; prompts count
    alike."""
    relative: np.ndarray
    """(N,): distances by the yardstick. NaN without one."""
    by_prompt: np.ndarray
    """(G,): their mean over prompts is the figure to report, and their spread that of the ratio,
    whose yardstick varies with the prompts too: the jackknife's values (Cochran, 1977, Sampling
    Techniques, section 6.17)."""


def forgetting(
    base: np.ndarray,
    finetuned: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    other_seeds: np.ndarray | None = None,
) -> Forgetting:
    """How far each picture (N, d) of the fine-tuned model is from the base's (N, d) of the same
    prompt and seed.

    groups: the prompt of each row; without, each is of its own. The yardstick comes from the base's
    pictures that share a prompt and, if given, from `other_seeds` (N, d), which are the base's of
    the same prompts by other seeds. Raises ValueError for shapes that do not go together.
    """
    before, after = unit(base), unit(finetuned)
    names: Sequence[Hashable] = range(len(before)) if groups is None else groups
    others = np.empty_like(before[:0]) if other_seeds is None else unit(other_seeds)
    if before.shape != after.shape or len(names) != len(before):
        raise ValueError(f"{before.shape} of base, {after.shape} fine-tuned, {len(names)} prompts")
    if len(others) not in (0, len(before)):
        raise ValueError(f"{len(others)} pictures by other seeds for {len(before)}")
    distances = 1 - (before * after).sum(1)
    yardsticks = _between_seeds(before, others, names)  # (G,)
    known = yardsticks[~np.isnan(yardsticks)]
    yardstick = float(known.mean()) if len(known) else float("nan")
    moved = np.array([distances[index].mean() for index in members(names).values()])
    # A base that ignores its seed has no yardstick: nothing is as different as another seed.
    if not yardstick > _least_yardstick(before, names):
        none = np.full_like(distances, np.nan), np.full_like(moved, np.nan)
        return Forgetting(distances, yardstick, *none)
    own = np.where(np.isnan(yardsticks), yardstick, yardsticks)
    return Forgetting(distances, yardstick, distances / yardstick, _by_prompt(moved, own))


def _by_prompt(moved: np.ndarray, yardsticks: np.ndarray) -> np.ndarray:
    """The jackknife's values (G,) of the ratio of the means of these (G,), around that ratio."""
    ratio = moved.mean() / yardsticks.mean()
    others = (yardsticks.sum() - yardsticks) / max(1, len(yardsticks) - 1)
    # A prompt that has all of the yardstick leaves nothing to divide by.
    away = (moved - ratio * yardsticks) / np.maximum(others, yardsticks.mean() / 4)
    return ratio + away - away.mean()


def _between_seeds(base: np.ndarray, others: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Of each prompt (G,), the mean distance between pictures by different seeds; NaN of a single
    picture."""
    means = []
    for index in members(groups).values():
        rows = np.concatenate([base[index], others[index]] if len(others) else [base[index]])
        first, second = np.triu_indices(len(rows), 1)
        between = 1 - (rows[first] * rows[second]).sum(1)
        means.append(float(between.mean()) if len(between) else float("nan"))
    return np.array(means)


def _least_yardstick(base: np.ndarray, groups: Sequence[Hashable]) -> float:
    """A share of the mean distance between the base's pictures (N, d) of different prompts."""
    means = np.array([base[index].mean(0) for index in members(groups).values()])
    count, total = len(means), means.sum(0)
    if count < 2:
        return _ROUNDING
    cosine = (total @ total - (means * means).sum()) / (count * (count - 1))  # of all pairs
    return max(_ROUNDING, _LEAST_SHARE * (1 - float(cosine)))
