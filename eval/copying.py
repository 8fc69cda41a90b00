"""The statistics of memorisation: how near is too near, and how often a sound model looks so.

Every picture has two numbers in the same logarithmic unit: its depth, -log of the distance to the
nearest training picture, and its contrast, the log of how much further the next ones are. Its score
is the lesser of the two, each above the mean that real pictures have. Three statistics of the
scores are referred to simulated sound models, whose pictures, training pictures and held-out ones
are points of one distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.counter import generator

NEIGHBOURS = 50  # that the nearest is set against, as Carlini et al. 2023 do
WORLDS = 500  # simulated sound models
DIMENSION = 4  # of their views: photographs vary in more ways, so chance comes as near less often
MOST = 256  # real pictures that nearness is read off from
SAME = 0.002  # of the median distance: below, two training pictures are one picture twice
TWICE = np.log(4.0)  # of squared distances: a copy is at most half as far as what comes next
EXCESS = 0.15  # of a share over the expected one: less may be a model that has learned well
_FLOOR = 1e-9  # of distances
_SPREAD, _WEIGHT = 0.4, 2.0  # what the spread of real scores is held to be before any is seen

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Nearest:
    """Of N pictures, each against the training pictures."""

    index: np.ndarray
    """(N,) the nearest training picture."""
    depth: np.ndarray
    """(N,) -log of the distance to it."""
    contrast: np.ndarray
    """(N,) log of the median distance to the next NEIGHBOURS over that to the nearest."""

    @classmethod
    def of(cls, distances: np.ndarray) -> Nearest:
        """From distances (N, M); NaN for a pair that does not count."""
        near = np.sort(distances, axis=1)[:, : NEIGHBOURS + 1]  # NaN last
        first = np.maximum(near[:, 0], _FLOOR)
        others = np.maximum(np.nanmedian(near[:, 1:], axis=1), _FLOOR)
        nearest = np.where(np.isnan(distances), np.inf, distances).argmin(1)
        return cls(nearest, -np.log(first), np.log(others / first))

    @classmethod
    def among(cls, distances: np.ndarray) -> Nearest:
        """Of some of the training pictures to the others, from their distances (rows, M) to all:
        what is as near as a picture to itself does not count."""
        same = max(SAME * float(np.median(distances)), 2 * _FLOOR)
        apart = np.where(distances < same, np.nan, distances)
        return cls.of(apart[(~np.isnan(apart)).sum(1) >= 2])

    def scores(self, centre: tuple[float, float]) -> np.ndarray:
        """(N,) the lesser of depth and contrast above a centre (depth, contrast), or of contrast
        above TWICE, if that is more: only what scores above 0 can be a copy."""
        return np.minimum(self.depth - centre[0], self.contrast - max(centre[1], TWICE))

    @property
    def centre(self) -> tuple[float, float]:
        return float(self.depth.mean()), float(self.contrast.mean())


def statistics(real: np.ndarray, scores: np.ndarray, prompts: Prompts) -> np.ndarray:
    """(3,), each the more suspicious the greater: the share of pictures beyond real ones, the
    greatest score, and the upper quartile of the prompts' mean scores.

    real (n,) and scores (N,) have one centre; prompts: the pictures of each.
    """
    means = np.array([scores[list(index)].mean() for index in prompts])
    deviations = ((real - real.mean()) ** 2).sum()
    spread = np.sqrt((_WEIGHT * _SPREAD**2 + deviations) / (_WEIGHT + len(real) - 1))
    share = shares(real, scores, prompts).max()
    return np.array(
        [
            share,
            (scores.max() - real.mean()) / spread,
            (np.quantile(means, 0.75) - real.mean()) / spread,
        ]
    )


def shares(real: np.ndarray, scores: np.ndarray, prompts: Prompts) -> np.ndarray:
    """By rank k from 1 to a third of the real scores: how far the share of pictures above the k-th
    greatest of them exceeds the expected k / (n + 1), in its standard deviations; 0 where it is by
    less than EXCESS."""
    ranks = np.arange(1, max(1, len(real) // 3) + 1)
    limits = np.maximum(np.sort(real)[-ranks], 0)
    above = scores[:, None] > limits  # (N, k)
    share = np.mean([above[list(index)].mean(0) for index in prompts], axis=0)
    expected = ranks / (len(real) + 1)
    spread = np.sqrt(expected * (1 - expected) * (1 / len(prompts) + 1 / len(real)))
    return np.where(share - expected >= EXCESS, (share - expected) / spread, 0)


@lru_cache(maxsize=32)
def sound_models(
    training: int, held_out: int, prompts: int, generated: int, seed: int
) -> np.ndarray:
    """`statistics` of simulated sound models, (WORLDS, 3), for so many pictures of each kind.

    held_out=0: the training pictures stand in for them. Prompts vary as pictures do.
    """
    rng = generator(seed, "sound models")
    singles = [[k] for k in range(prompts)]
    found = np.empty((WORLDS, 3))
    for world in range(WORLDS):
        seen = rng.standard_normal((training, DIMENSION))
        made = Nearest.of(_squared(rng.standard_normal((generated, DIMENSION)), seen))
        if held_out:
            null = Nearest.of(_squared(rng.standard_normal((held_out, DIMENSION)), seen))
        else:
            null = Nearest.among(_squared(seen, seen))
        real, scores = null.scores(null.centre), made.scores(null.centre)
        found[world] = statistics(real, scores[:prompts], singles)
        found[world, 1] = statistics(real, scores, singles)[1]  # of all the pictures
    return found


def p_value(observed: np.ndarray, simulated: np.ndarray) -> float:
    """How often a sound model's most suspicious statistic is as rare as the observed (3,) is."""
    worlds = len(simulated)
    ordered = np.sort(simulated, axis=0)
    rarest = np.full(worlds + 1, worlds + 1)
    for column in range(simulated.shape[1]):
        values = np.append(simulated[:, column], observed[column])
        at_least = worlds - np.searchsorted(ordered[:, column], values, side="left") + 1
        rarest = np.minimum(rarest, at_least)
    return float((1 + (rarest[:-1] <= rarest[-1]).sum()) / (worlds + 1))


def interval(marked: np.ndarray, prompts: Prompts) -> tuple[float, float]:
    """95 % interval of the share of marked pictures (N,), over prompts: Wilson's, of as many
    independent pictures as the prompts' differences leave."""
    share, z = float(marked.mean()), 1.96
    means = np.array([marked[list(index)].mean() for index in prompts])
    between = means.var(ddof=1) / len(means) if len(means) > 1 else 0.0
    count = np.clip(share * (1 - share) / between, 1, len(marked)) if between > 0 else len(prompts)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def _squared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distances (N, M): of unit rows, 1 - cosine is half of that."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.maximum(squares, 0)
