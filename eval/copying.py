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
from typing import Any

import numpy as np

from data.counter import generator

NEIGHBOURS = 50  # that the nearest is set against, as Carlini et al. 2023 do
WORLDS = 10_000  # simulated sound models
LEAST_WORLDS = 500  # where there are many pictures
WORK = 1 << 27  # distances between simulated pictures, at the most
AT_ONCE = 1 << 19  # of these in memory
DIMENSION = 4  # of their views: photographs vary in more ways, so chance comes as near less often
MOST = 256  # real pictures that nearness is read off from
SAME = 0.002  # of the median distance: below, two training pictures are one picture twice
TWICE = np.log(4.0)  # of squared distances: a copy is at most half as far as what comes next
EXCESS = 0.15  # of a share over the expected one: less may be a model that has learned well
KIND = 0.1  # p below which held-out pictures are held to be of another kind than training ones
SPLITS = 2000  # of real pictures, to tell that
_FLOOR = 1e-9  # of distances
_GREATEST = 0.5  # p that counts: tests that see nothing dilute the others and outweigh none
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
        nearest = np.where(np.isnan(distances), np.inf, distances).argmin(1)
        return cls(nearest, *_depth_and_contrast(distances))

    @classmethod
    def among(cls, distances: np.ndarray) -> Nearest:
        """Of some of the training pictures to the others, from their distances (rows, M) to all:
        what is as near as a picture to itself does not count."""
        apart = np.where(_same(distances), np.nan, distances)
        return cls.of(apart[(~np.isnan(apart)).sum(1) >= 2])

    def scores(self, centre: tuple[float, float]) -> np.ndarray:
        """(N,) the lesser of depth and contrast above a centre (depth, contrast), or of contrast
        above TWICE, if that is more: only what scores above 0 can be a copy."""
        return _scores(self.depth, self.contrast, centre)

    @property
    def centre(self) -> tuple[float, float]:
        return float(self.depth.mean()), float(self.contrast.mean())


def statistics(real: np.ndarray, scores: np.ndarray, prompts: Prompts) -> np.ndarray:
    """(..., 3), each the more suspicious the greater: the share of pictures beyond real ones, the
    greatest score, and the upper quartile of the prompts' mean scores.

    real (..., n) and scores (..., N) have one centre; prompts: the pictures of each.
    """
    middle = real.mean(-1)
    deviations = ((real - middle[..., None]) ** 2).sum(-1)
    spread = np.sqrt((_WEIGHT * _SPREAD**2 + deviations) / (_WEIGHT + real.shape[-1] - 1))
    means = scores @ _weights(prompts, scores.shape[-1]).T  # (..., prompts)
    share = shares(real, scores, prompts).max(-1)
    greatest = (scores.max(-1) - middle) / spread
    return np.stack([share, greatest, (np.quantile(means, 0.75, axis=-1) - middle) / spread], -1)


def shares(real: np.ndarray, scores: np.ndarray, prompts: Prompts) -> np.ndarray:
    """(..., k), by rank from 1 to a third of the real scores (..., n): how far the share of
    pictures (..., N) above the real score of that rank exceeds the expected rank / (n + 1), in its
    standard deviations; 0 where it is by less than EXCESS."""
    n = real.shape[-1]
    ranks = np.arange(1, max(1, n // 3) + 1)
    limits = np.maximum(np.sort(real)[..., -ranks], 0)
    weight = _weights(prompts, scores.shape[-1]).mean(0)  # (N,)
    share = np.stack([(scores > limits[..., [k]]) @ weight for k in range(len(ranks))], -1)
    expected = ranks / (n + 1)
    spread = np.sqrt(expected * (1 - expected) * (1 / len(prompts) + 1 / n))
    return np.where(share - expected >= EXCESS, (share - expected) / spread, 0)


@lru_cache(maxsize=32)
def sound_models(
    training: int, held_out: int, prompts: int, generated: int, seed: int
) -> np.ndarray:
    """`statistics` of simulated sound models, (WORLDS, 3) or fewer, for so many pictures of each
    kind.

    held_out=0: the training pictures stand in for them. Prompts vary as pictures do.
    """
    rng = generator(seed, "sound models")
    each = training * (generated + (held_out or training))
    worlds = int(np.clip(WORK // each, LEAST_WORLDS, WORLDS))
    at_once = max(1, AT_ONCE // each)
    parts = [min(at_once, worlds - start) for start in range(0, worlds, at_once)]
    return np.concatenate(
        [_sound_models(training, held_out, prompts, generated, part, rng) for part in parts]
    )


def _sound_models(
    training: int,
    held_out: int,
    prompts: int,
    generated: int,
    worlds: int,
    rng: np.random.Generator,
) -> np.ndarray:
    def points(count: int) -> np.ndarray:
        return rng.standard_normal((worlds, count, DIMENSION))

    seen = points(training)
    made = _depth_and_contrast(_squared(points(generated), seen))
    distances = _squared(points(held_out) if held_out else seen, seen)
    if not held_out:
        distances[:, range(training), range(training)] = np.nan
    null = _depth_and_contrast(distances)
    centre = tuple(each.mean(-1, keepdims=True) for each in null)
    singles = [[k] for k in range(prompts)]
    return statistics(_scores(*null, centre), _scores(*made, centre), singles)


def of_another_kind(training: np.ndarray, held_out: np.ndarray, seed: int) -> float:
    """How often real pictures, split at random, differ as much as those trained on (M, d) and the
    held-out ones (K, d) do, rows of unit length: p of a permutation test of the energy distance
    (Székely and Rizzo 2013, doi:10.1016/j.jspi.2013.03.018). 1 where the held-out pictures are no
    further from those trained on than these from each other."""
    rng = generator(seed, "kinds of real pictures")
    seen, views = (some(rows, rng) for rows in (training, held_out))
    seen = seen[~np.tril(_same(1 - seen @ seen.T), -1).any(1)]  # each once
    real = np.concatenate([seen, views])
    distances = np.maximum(1 - real @ real.T, 0)
    np.fill_diagonal(distances, 0)
    first = np.arange(len(real)) < len(seen)
    splits = np.stack([first, *(rng.permutation(first) for _ in range(SPLITS))]).astype(float)
    within, across = _mean_distances(splits, distances), _mean_across(splits, distances)
    energy = 2 * across - within - _mean_distances(1 - splits, distances)
    if across[0] <= within[0]:
        return 1.0
    return float((energy >= energy[0] - _FLOOR).mean())


def _mean_distances(chosen: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """(splits,), between the chosen ones (splits, n) of n pictures."""
    count = chosen.sum(1)
    return ((chosen @ distances) * chosen).sum(1) / np.maximum(count * (count - 1), 1)


def _mean_across(chosen: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """(splits,), from the chosen ones to the others."""
    others = 1 - chosen
    return ((chosen @ distances) * others).sum(1) / (chosen.sum(1) * others.sum(1))


def joint(ps: Sequence[float]) -> float:
    """One p of those of several tests, however these are correlated: Cauchy's combination (Liu and
    Xie 2020, doi:10.1080/01621459.2018.1554485) with p above 0.5 counted as that. It is their
    common value where they agree, and at most Bonferroni's."""
    clipped = np.clip(ps, 1e-12, _GREATEST)
    return float(0.5 - np.arctan(np.tan((0.5 - clipped) * np.pi).mean()) / np.pi)


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


def some(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """MOST of the rows (n, d) at the most, in their order."""
    return rows[np.sort(rng.permutation(len(rows))[:MOST])]


def _depth_and_contrast(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each (..., N), from distances (..., N, M) with NaN for pairs that do not count, of which
    every row leaves two."""
    near = np.sort(distances, axis=-1)  # NaN last
    last = np.minimum((~np.isnan(near)).sum(-1, keepdims=True) - 1, NEIGHBOURS)
    middle = np.concatenate([(last + 1) // 2, last // 2 + 1], -1)  # of those from 1 to last
    first = np.maximum(near[..., 0], _FLOOR)
    others = np.maximum(np.take_along_axis(near, middle, -1).mean(-1), _FLOOR)
    return -np.log(first), np.log(others / first)


def _scores(depth: np.ndarray, contrast: np.ndarray, centre: Sequence[Any]) -> np.ndarray:
    return np.minimum(depth - centre[0], contrast - np.maximum(centre[1], TWICE))


def _weights(prompts: Prompts, pictures: int) -> np.ndarray:
    """(prompts, pictures): times scores of pictures it gives the means of prompts."""
    weights = np.zeros((len(prompts), pictures))
    for row, index in zip(weights, prompts, strict=True):
        row[list(index)] = 1 / len(index)
    return weights


def _same(distances: np.ndarray) -> np.ndarray:
    """Which pairs of training pictures are one picture twice."""
    return distances < max(SAME * float(np.median(distances)), 2 * _FLOOR)


def _squared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distances (..., N, M): of unit rows, 1 - cosine is half of that."""
    products = first @ np.swapaxes(second, -1, -2)
    lengths = (first**2).sum(-1)[..., None] + (second**2).sum(-1)[..., None, :]
    return np.maximum(lengths - 2 * products, 0)
