"""Which pictures are held out of training, for evaluation: a function of the pictures, and of what
was held out before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.counter import uniform
from data.files import write_atomically
from train.config import UserError

SPLIT = "split.json"

Sides = Mapping[str, bool]  # by sha256 of a picture: whether it is held out


def hold_out(
    sha256: Sequence[str],
    groups: np.ndarray,
    kept: np.ndarray,
    *,
    wanted: float,
    seed: int = 0,
    before: Sides | None = None,
) -> tuple[np.ndarray, dict[str, bool]]:
    """bool (n,): the pictures to hold out; and the sides that are decided now, to be remembered.

    `sha256` and `groups` (n,), each picture's group of near-duplicates, are of all pictures; `kept`
    (n,) are those that are left after all filters. Whole groups go to one side, and which one does
    not depend on the filters: a group with a picture that was held out `before` is held out, and
    one with a picture that was trained on stays with training. Each other group draws a number from
    [0, 1) by `seed` and the least hash among its pictures. `wanted` below 1 is a share: the groups
    that drew less are held out, so that new pictures move no others. From 1 on it is a number of
    kept pictures: the groups that drew least, as many as fit. Raises UserError where so many would
    leave nothing to train on.
    """
    names = groups.tolist()
    sides = _known_sides(sha256, names, before or {})
    drawn = _drawn(sha256, names, sides, seed)
    if wanted < 1:
        sides |= {group: number < wanted for group, number in drawn.items()}
    else:
        sides |= _as_many(drawn, sides, groups[kept], round(wanted))
    decided = {
        digest: sides[group] for group, digest in zip(names, sha256, strict=True) if group in sides
    }
    return np.array([sides.get(group, False) for group in names], bool), decided


def _known_sides(sha256: Sequence[str], groups: Sequence[int], before: Sides) -> dict[int, bool]:
    sides: dict[int, bool] = {}
    for group, digest in zip(groups, sha256, strict=True):
        if digest in before:
            sides[group] = sides.get(group, False) or before[digest]
    return sides


def _drawn(
    sha256: Sequence[str], groups: Sequence[int], sides: Mapping[int, bool], seed: int
) -> dict[int, float]:
    least: dict[int, str] = {}
    for group, digest in zip(groups, sha256, strict=True):
        if group not in sides:
            least[group] = min(digest, least.get(group, digest))
    return {group: uniform(seed, "held out", digest) for group, digest in least.items()}


def _as_many(
    drawn: Mapping[int, float], sides: Mapping[int, bool], kept: np.ndarray, count: int
) -> dict[int, bool]:
    """The sides of those that drew; a group of which nothing is kept is not decided."""
    if count >= len(kept):
        raise UserError(
            f"held_out={count} of {len(kept)} pictures leaves none to train on: hold out fewer"
        )
    names, sizes = np.unique(kept, return_counts=True)
    size = dict(zip(names.tolist(), sizes.tolist(), strict=True))
    count -= sum(size.get(group, 0) for group, held in sides.items() if held)
    found: dict[int, bool] = {}
    for group in sorted(drawn.keys() & size.keys(), key=lambda group: (drawn[group], group)):
        found[group] = size[group] <= count
        count -= size[group] if found[group] else 0
    return found


# What was held out before ---------------------------------------------------------------------


def read_sides(folder: Path, *, wanted: float, seed: int) -> dict[str, bool]:
    """What `write_sides` wrote for the same two settings; nothing where they were others."""
    file = folder / SPLIT
    try:
        content = json.loads(file.read_bytes())
        if (content["held_out"], content["seed"]) != (wanted, seed):
            return {}
        sides = {str(digest): True for digest in content["held-out"]}
        return {str(digest): False for digest in content["train"]} | sides
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}, which says what was held out before, cannot be read "
            f"({type(error).__name__}: {error}): restore it, or remove it to draw anew"
        ) from None


def write_sides(folder: Path, sides: Sides, *, wanted: float, seed: int) -> None:
    """So that the next run leaves every picture on its side, whatever its other settings are."""
    content: dict[str, object] = {"held_out": wanted, "seed": seed}
    for name, side in (("held-out", True), ("train", False)):
        content[name] = sorted(digest for digest, held in sides.items() if held == side)
    write_atomically(folder / SPLIT, json.dumps(content, indent=0).encode("ascii"))
