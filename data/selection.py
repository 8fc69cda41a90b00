"""Which pictures stay and why the others go: by size, as duplicates, as leaks, by score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data import duplicates
from data.duplicates import Match, Prints
from data.records import Table


@dataclass
class Selection:
    """Of n pictures: which are left, and by index the filter and reason of the others."""

    count: int
    left_out: dict[int, tuple[str, str]] = field(default_factory=dict)

    def remove(self, index: int | np.integer, by: str, reason: str) -> None:
        """The first filter that leaves a picture out is the one that is named."""
        self.left_out.setdefault(int(index), (by, reason))

    @property
    def left(self) -> np.ndarray:
        """The indices still in, in order, int64."""
        mask = np.ones(self.count, bool)
        mask[list(self.left_out)] = False
        return np.flatnonzero(mask)

    def counts(self) -> dict[str, int]:
        """How many each filter left out."""
        return dict(Counter(by for by, _ in self.left_out.values()))


def by_size(
    selection: Selection,
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    smallest: int | None,
    max_aspect: float | None,
) -> None:
    """Leaves out what has a side under `smallest` pixels, or a long side over `max_aspect` times
    the short one."""
    short, long = np.minimum(widths, heights), np.maximum(widths, heights)
    if smallest is not None:
        for k in np.flatnonzero(short < smallest):
            reason = f"{widths[k]} x {heights[k]} pixels, a side under {smallest}"
            selection.remove(k, "smallest", reason)
    if max_aspect is not None:
        for k in np.flatnonzero(long > max_aspect * short):
            ratio = f"{long[k] / short[k]:.3g} to 1"
            reason = f"{widths[k]} x {heights[k]} pixels, {ratio}, over {max_aspect:g} to 1"
            selection.remove(k, "max_aspect", reason)


def by_score(
    selection: Selection,
    name: str,
    values: np.ndarray,
    indices: np.ndarray,
    *,
    limit: float,
    above: bool,
) -> None:
    """Leaves out those of `indices` whose value, in the same order, is not `above` the limit or
    equal to it; else those whose value is not below it. What is no number is left out."""
    for k, value in zip(indices, values, strict=True):
        if above and not value >= limit:
            selection.remove(k, name, f"{name} score {value:.3g}, under {limit:g}")
        elif not above and not value <= limit:
            selection.remove(k, name, f"{name} score {value:.3g}, over {limit:g}")


def find_duplicates(
    table: Table,
    prints: Prints,
    groups: np.ndarray,
    chosen: np.ndarray,
    *,
    distance: int,
    default: str | None,
) -> list[Match]:
    """Which pictures of `chosen` (m,) double a better one of them; `groups` (n,) are those of all
    pictures.

    Better is who has more pixels, then who has a caption of its own (not the `default`), then whose
    id is first. The indices of the matches are those of the table.
    """
    labels = groups[chosen]
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    matches: list[Match] = []
    for members in np.split(order, starts[1:]) if len(order) else []:
        if len(members) > 1:
            ranked = _best_first(table, chosen[members], default)
            matches += duplicates.thin(prints, ranked, distance=distance)[1]
    return matches


def _best_first(table: Table, members: np.ndarray, default: str | None) -> list[int]:
    def rank(k: int) -> tuple[int, bool, str]:
        record = table[k]
        return -record.width * record.height, record.captions == (default,), record.id

    return sorted(map(int, members), key=rank)


def describe(matches: Sequence[Match], table: Table, removed: bool) -> list[dict[str, Any]]:
    """Groups of a picture and its duplicates for report.json, the largest first."""
    groups: dict[int, list[Match]] = {}
    for match in matches:
        groups.setdefault(match.kept, []).append(match)
    ids = {k: table[k].id for k in {*groups, *(match.index for match in matches)}}
    hashes = {k: table[k].sha256 for k in ids}

    def entry(match: Match) -> Mapping[str, object]:
        return {
            "id": ids[match.index],
            "distance": match.distance,
            "mirrored": match.mirrored,
            "exact": hashes[match.index] == hashes[match.kept],
            "removed": removed,
        }

    rows: list[dict[str, Any]] = [
        {"kept": ids[kept], "copies": [entry(m) for m in sorted(found, key=lambda m: ids[m.index])]}
        for kept, found in groups.items()
    ]
    return sorted(rows, key=lambda row: (-len(row["copies"]), row["kept"]))


def how_alike(match: Match, *, exact: bool) -> str:
    """ "the same file", "mirrored, 4 of 64 bits apart"."""
    if exact:
        return "the same file"
    return f"{'mirrored, ' if match.mirrored else ''}{match.distance} of 64 bits apart"
