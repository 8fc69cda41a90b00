"""Which pictures make up each batch: a function of the seed and the step alone.

A batch is defined globally: `batch_size` pictures of one bucket per optimizer step, whatever the
number of processes. The last batch of a bucket may be short: no picture is dropped, and none is
repeated to fill it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data import counter
from data.buckets import pack, unpack
from data.images import Size
from train.config import UserError

MOST_SAMPLES = 1 << 27  # of an epoch, which is in memory at 8 bytes a sample


class _Group(NamedTuple):
    """The pictures of one source in one bucket, and how many samples an epoch takes of them."""

    source: int
    pictures: np.ndarray  # indices
    passes: int  # how often an epoch has all of them
    extra: float  # samples besides, on average

    def window(self, epoch: int) -> tuple[int, int]:
        """The epoch's part (start, stop) of the endless sequence of extra samples."""
        return math.floor(epoch * self.extra), math.floor((epoch + 1) * self.extra)

    def samples(self, epoch: int) -> int:
        start, stop = self.window(epoch)
        return self.passes * len(self.pictures) + stop - start

    def samples_before(self, epoch: int) -> int:
        return epoch * self.passes * len(self.pictures) + self.window(epoch)[0]


class _Bucket(NamedTuple):
    size: Size
    groups: list[_Group]

    def samples(self, epoch: int) -> int:
        return sum(group.samples(epoch) for group in self.groups)


class _Epoch(NamedTuple):
    number: int
    indices: np.ndarray  # (samples,) int32, bucket by bucket
    repeats: np.ndarray  # (samples,) int32
    starts: np.ndarray  # (batches + 1,) where among the samples each batch begins
    batches: np.ndarray  # (batches,) in the order in which they are trained on


class Order:
    """The order of training on n pictures with bucket sizes (n, 2), from `sources` (n,) if several.

    Without `weights` every epoch has each picture exactly `repeats[source]` times (1 by default).
    With `weights`, one positive number per source, `repeats` do not count: an epoch is then the
    smallest in which the sources' samples are in these proportions and every picture is there at
    least once.

    What an epoch has of each source in each bucket are whole passes, each pass a permutation of
    its own, and where weights ask for a part of one more, the next so many of an endless sequence
    of passes. So over the epochs all pictures of a source are seen equally often, give or take one,
    and epochs differ by no more than a sample of each source in each bucket.

    Raises UserError where an epoch would have more than 2 ** 27 samples.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        sources: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        repeats: Sequence[int] | None = None,
    ) -> None:
        assert len(sizes) > 0 and batch_size > 0
        self.seed, self.batch_size = seed, batch_size
        if sources is None:
            sources = np.zeros(len(sizes), np.int32)
        factors = _factors(sources, weights, repeats)
        _check(sources, factors)
        self._buckets = list(_grouped(sizes, sources, factors))
        self._alike = all(g.extra.is_integer() for bucket in self._buckets for g in bucket.groups)
        self._firsts = [0]  # the first step of each epoch, as far as they are known
        self._epoch: _Epoch | None = None

    def samples_in(self, epoch: int) -> int:
        """Samples of an epoch, repeats counted."""
        return sum(bucket.samples(epoch) for bucket in self._buckets)

    def samples_before(self, epoch: int) -> dict[tuple[int, Size], int]:
        """Samples of each source in each bucket in all epochs before this one."""
        return {
            (group.source, bucket.size): group.samples_before(epoch)
            for bucket in self._buckets
            for group in bucket.groups
        }

    def batches_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch, for any number of processes."""
        return sum(-(-bucket.samples(epoch) // self.batch_size) for bucket in self._buckets)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of an optimizer step; all count from 0."""
        if self._alike:
            return divmod(step, self.batches_in(0))
        while self._firsts[-1] <= step:
            self._firsts.append(self._firsts[-1] + self.batches_in(len(self._firsts) - 1))
        epoch = bisect.bisect_right(self._firsts, step) - 1
        return epoch, step - self._firsts[epoch]

    def epochs(self, steps: int) -> float:
        """How many epochs so many optimizer steps are."""
        epoch, batch = self.position(steps)
        return epoch + batch / self.batches_in(epoch)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of a step: indices and repeats, int64 (B,) each.

        `repeats` counts how often the epoch had that picture before: 0 for the first time. With the
        picture's id and the step or epoch it is what a sample's randomness is drawn from.
        """
        number, position = self.position(step)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = None  # before the next one is made, so that there is never more than one
            self._epoch = self._shuffled(number)
        batch = self._epoch.batches[position]
        inside = slice(self._epoch.starts[batch], self._epoch.starts[batch + 1])
        indices, repeats = self._epoch.indices[inside], self._epoch.repeats[inside]
        return indices.astype(np.int64), repeats.astype(np.int64)

    def _shuffled(self, number: int) -> _Epoch:
        samples = self.samples_in(number)
        indices, repeats = np.empty(samples, np.int32), np.empty(samples, np.int32)
        starts, at = [], 0
        for bucket in self._buckets:
            start = at
            for group in bucket.groups:
                for part, seen in self._passes(group, bucket.size, number):
                    indices[at : at + len(part)], repeats[at : at + len(part)] = part, seen
                    at += len(part)
            mixed = self._permutation(at - start, "mix", *bucket.size, number)
            inside = slice(start, at)
            indices[inside], repeats[inside] = indices[inside][mixed], repeats[inside][mixed]
            starts.append(np.arange(start, at, self.batch_size))
        batches = self._permutation(sum(map(len, starts)), "batches", number)
        return _Epoch(number, indices, repeats, np.concatenate([*starts, [at]]), batches)

    def _passes(
        self, group: _Group, size: Size, epoch: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The epoch's samples of a group: indices, and how often each was there before."""
        count = len(group.pictures)
        for number in range(group.passes):
            part = self._permutation(count, "pass", group.source, *size, epoch, number)
            yield group.pictures[part], np.full(count, number, np.int32)
        start, stop = group.window(epoch)
        seen = np.full(count, group.passes, np.int32)
        for number in range(start // count, -(-stop // count)):
            shuffled = self._permutation(count, "extra", group.source, *size, number)
            part = shuffled[max(start - number * count, 0) : stop - number * count]
            yield group.pictures[part], seen[part]
            seen[part] += 1

    def _permutation(self, count: int, *purpose: str | int) -> np.ndarray:
        return counter.generator(self.seed, "order", *purpose).permutation(count)


def share(count: int, *, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
    """What process `rank` of `world` does of a global batch of `count`: (positions, weights).

    The sum of loss x weight over all processes is the mean over the batch. Where `count` does not
    divide by `world`, some positions stand twice, the second time with weight 0, so that all
    processes have equally many.
    """
    positions = np.arange(rank, -(-count // world) * world, world)
    return positions % count, np.where(positions < count, np.float32(1 / count), np.float32(0))


def _factors(
    sources: np.ndarray, weights: Sequence[float] | None, repeats: Sequence[int] | None
) -> np.ndarray:
    """How often an epoch has the pictures of each source, on average: float64 (sources,)."""
    pictures = np.bincount(sources)
    if weights is None:
        return np.ones(len(pictures)) if repeats is None else np.asarray(repeats, np.float64)
    assert len(weights) >= len(pictures) and min(weights) > 0
    rarest = max(pictures / np.asarray(weights)[: len(pictures)])
    return np.asarray(weights)[: len(pictures)] * rarest / np.maximum(pictures, 1)


def _group(source: int, pictures: np.ndarray, factor: float) -> _Group:
    near = round(factor)
    if math.isclose(factor, near, rel_tol=1e-12):  # what rounding has added to or taken from it
        return _Group(source, pictures, near, 0.0)
    passes = math.floor(factor)
    return _Group(source, pictures, passes, float(len(pictures) * (factor - passes)))


def _check(sources: np.ndarray, factors: np.ndarray) -> None:
    pictures = np.bincount(sources, minlength=len(factors))
    samples = pictures * factors
    if samples.sum() > MOST_SAMPLES:
        worst = int(factors.argmax())
        raise UserError(
            f"data.sources: an epoch would have {samples.sum():.3g} samples, because each of the "
            f"{pictures[worst]} pictures of source {worst + 1} would be there {factors[worst]:.3g} "
            f"times: bring the weights, or its repeats, closer to the others'"
        )


def _grouped(sizes: np.ndarray, sources: np.ndarray, factors: np.ndarray) -> Iterator[_Bucket]:
    codes, of_bucket = np.unique(pack(sizes), return_inverse=True)
    of_group = of_bucket * len(factors) + sources
    members = np.argsort(of_group, kind="stable").astype(np.int32)
    groups, starts = np.unique(of_group[members], return_index=True)
    parts = np.split(members, starts[1:])
    at = 0
    for number, code in enumerate(codes):
        inside = []
        while at < len(groups) and groups[at] // len(factors) == number:
            source, pictures = int(groups[at] % len(factors)), parts[at]
            inside.append(_group(source, pictures, factors[source]))
            at += 1
        yield _Bucket(unpack(code), inside)
