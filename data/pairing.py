"""DreamBooth's class pictures, one beside each sample: which of them, in which bucket, when.

A batch has one size, so a class picture is cropped to the bucket of the pictures it stands beside,
and each bucket gets as large a part of them as it has samples. Like the order itself, all of it is
a function of the seed and the step alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from data import counter
from data.buckets import pack
from data.images import Size
from data.order import Order
from train.config import UserError


class Partners(Protocol):
    """What stands beside the samples of each step."""

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of `Order.batch`, the index of what stands beside it and how often that
        was there before: int64 (B,) each."""


class Doubled:
    """Every sample a second time: picture i of n stands again at n + i."""

    def __init__(self, order: Order, count: int) -> None:
        self._order, self._count = order, count

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        indices, repeats = self._order.batch(step)
        return indices + self._count, repeats


class Pairing:
    """A class picture of the same class and bucket beside each sample of `order`.

    sizes, sources: bucket (n, 2) and source (n,) of the n pictures of the order. classes: the class
    of each source. class_sizes, class_of: bucket (m, 2) and class (m,) of the class pictures, whose
    indices follow those of the order: the first is n.

    The samples of a class in a bucket are counted as the run comes to them, from 0. Sample k gets
    the k-th of an endless sequence of passes over the class pictures that are there, each pass a
    permutation of its own. So all of those are trained on equally often, give or take one.
    """

    def __init__(
        self,
        order: Order,
        *,
        seed: int,
        sizes: np.ndarray,
        sources: np.ndarray,
        classes: Sequence[int],
        class_sizes: np.ndarray,
        class_of: np.ndarray,
    ) -> None:
        self._order, self._seed, self._classes = order, seed, classes
        self._names, self._groups = _grouped(np.asarray(classes)[sources], sizes)
        self._members = _members(self._names, class_of, class_sizes, first=len(sizes))
        self._epoch: tuple[int, list[np.ndarray]] | None = None

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        indices, _ = self._order.batch(step)
        found = [
            self._picture(int(self._groups[index]), int(number))
            for index, number in zip(indices, self._numbers(step), strict=True)
        ]
        partners, passed = np.array(found, np.int64).T
        return partners, passed

    def _picture(self, group: int, number: int) -> tuple[int, int]:
        """(index, times before) of what stands beside sample `number` of a group."""
        members = self._members[group]
        passed, place = divmod(number, len(members))
        purpose = ("class pictures", *self._names[group], passed)
        shuffled = counter.generator(self._seed, *purpose).permutation(len(members))
        return int(members[shuffled[place]]), passed

    def _numbers(self, step: int) -> np.ndarray:
        """Which sample of its group each of the step's is."""
        epoch, position = self._order.position(step)
        if self._epoch is None or self._epoch[0] != epoch:
            first, count = step - position, self._order.batches_in(epoch)
            batches = [self._order.batch(at)[0] for at in range(first, first + count)]
            groups = self._groups[np.concatenate(batches)]
            counted = self._before(epoch)[groups] + _occurrences(groups)
            ends = np.cumsum([len(batch) for batch in batches])[:-1]
            self._epoch = epoch, np.split(counted, ends)
        return self._epoch[1][position]

    def _before(self, epoch: int) -> np.ndarray:
        """How many samples each group had in all epochs before this one: int64 (groups,)."""
        places = {name: at for at, name in enumerate(self._names)}
        before = np.zeros(len(places), np.int64)
        for (source, size), samples in self._order.samples_before(epoch).items():
            before[places[self._classes[source], *size]] += samples
        return before


def share_out(
    samples: Mapping[Size, float], widths: np.ndarray, heights: np.ndarray, *, what: str
) -> np.ndarray:
    """The bucket (width, height) of each of m class pictures: int32 (m, 2).

    samples: how many an epoch has in each bucket. Each bucket gets its share of the class pictures,
    but one at the least. Widest goes with widest: of all ways to give the buckets so many each,
    this one has the least sum of changes in the logarithm of the aspect ratio, squared or not.
    Raises UserError, beginning with `what`, where there are fewer pictures than buckets.
    """
    check_enough(samples, len(widths), what=what)
    wanted = np.array(in_proportion(samples, len(widths), each=True), np.int32)
    sizes = np.empty_like(wanted)
    sizes[_by_aspect(widths, heights)] = wanted[_by_aspect(*wanted.T)]
    return sizes


def check_enough(samples: Mapping[Size, float], pictures: int, *, what: str) -> None:
    """Raises UserError where not every bucket can get one of so many class pictures."""
    if pictures < len(samples):
        raise UserError(
            f"{what}: {pictures} class pictures cannot stand beside pictures in {len(samples)} "
            "buckets, of which each needs one: have more of them (dreambooth.class_images, where "
            "the base makes them), or fewer buckets by a larger data.bucket_step"
        )


def in_proportion(shares: Mapping[Size, float], count: int, *, each: bool = False) -> list[Size]:
    """`count` sizes in proportion to their shares; a larger count only adds to the list.

    Each is the one that lags most behind its share, so every beginning of the list is as near to
    the shares as whole numbers can be; with `each`, apart from its first sizes, which are all that
    there are, the largest share first.
    """
    sizes, wanted = list(shares), np.array(list(shares.values()), np.float64)
    wanted /= wanted.sum()
    firsts = np.argsort(-wanted, kind="stable").tolist() if each else []
    given = np.zeros(len(sizes))
    chosen = []
    for k in range(1, count + 1):
        # Rounded, or noise in the last place would decide between equals.
        lag = np.round(wanted * k - given, 9)
        at = firsts[k - 1] if k <= len(firsts) else int(np.argmax(lag))
        given[at] += 1
        chosen.append(sizes[at])
    return chosen


def samples_per_bucket(order: Order, sources: Sequence[int]) -> dict[Size, int]:
    """How many samples of these sources the first epoch has in each bucket, sorted by size."""
    counts: Counter[Size] = Counter()
    for (source, size), samples in order.samples_before(1).items():
        if source in sources:
            counts[size] += samples
    return dict(sorted(counts.items()))


def _by_aspect(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Narrowest first, and of one aspect ratio the smallest: int64 (n,)."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    return np.lexsort((widths * heights, widths / heights))


def _grouped(
    classes: np.ndarray, sizes: np.ndarray
) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Every (class, width, height) there is, and which of them each picture has."""
    codes = np.stack([classes.astype(np.int64), pack(sizes)], axis=1)
    names, groups = np.unique(codes, axis=0, return_inverse=True)
    found = [(int(one), int(code) >> 32, int(code) & 0xFFFFFFFF) for one, code in names]
    return found, groups.reshape(-1)


def _members(
    names: Sequence[tuple[int, int, int]], class_of: np.ndarray, sizes: np.ndarray, *, first: int
) -> list[np.ndarray]:
    """The class pictures of each group."""

    def found() -> Iterator[np.ndarray]:
        for number, width, height in names:
            inside = (class_of == number) & (sizes == (width, height)).all(axis=1)
            assert inside.any(), "every bucket was to have a class picture"
            yield first + np.flatnonzero(inside)

    return list(found())


def _occurrences(values: np.ndarray) -> np.ndarray:
    """How often each value was there before: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    starts = np.flatnonzero(np.diff(ranked, prepend=ranked[0] - 1))
    lengths = np.diff(np.append(starts, len(ranked)))
    counts = np.empty(len(values), np.int64)
    counts[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return counts
