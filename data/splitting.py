"""Which pictures are held out of training, for evaluation: a function of the pictures alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.counter import uniform
from train.config import UserError


def hold_out(
    sha256: Sequence[str], groups: np.ndarray, *, wanted: float, seed: int = 0
) -> np.ndarray:
    """bool (n,): the pictures to hold out; whole groups of near-duplicates go to one side.

    `groups` (n,) numbers each picture's group. Each group draws a number from [0, 1) by `seed` and
    the least hash among its pictures. `wanted` below 1 is a share: the groups that drew less are
    held out, so that new pictures move no others, unless they join them into one group. From 1 on
    it is a number of pictures: the groups that drew least, as many as fit. Raises UserError where
    so many would leave nothing to train on.
    """
    least: dict[int, str] = {}
    for group, digest in zip(groups.tolist(), sha256, strict=True):
        least[group] = min(digest, least.get(group, digest))
    drawn = {group: uniform(seed, "held out", digest) for group, digest in least.items()}
    if wanted < 1:
        chosen = {group for group, number in drawn.items() if number < wanted}
    else:
        chosen = _as_many(drawn, groups, round(wanted))
    return np.array([group in chosen for group in groups.tolist()], bool)


def _as_many(drawn: dict[int, float], groups: np.ndarray, count: int) -> set[int]:
    if count >= len(groups):
        raise UserError(
            f"held_out={count} of {len(groups)} pictures leaves none to train on: hold out fewer"
        )
    names, sizes = np.unique(groups, return_counts=True)
    size = dict(zip(names.tolist(), sizes.tolist(), strict=True))
    chosen: set[int] = set()
    for group in sorted(drawn, key=lambda group: (drawn[group], group)):
        if size[group] <= count:
            chosen.add(group)
            count -= size[group]
    return chosen
