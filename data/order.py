"""Which pictures make up each batch: a function of the seed and the step alone.

A batch is defined globally: `batch_size` pictures of one bucket per optimizer step, whatever the
number of processes. The last batch of a bucket may be short: no picture is dropped, and none is
repeated to fill it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data import counter
from data.buckets import pack, unpack
from data.images import Size


class _Group(NamedTuple):
    """The pictures of one source in one bucket, and how many samples an epoch takes of them."""

    source: int
    pictures: np.ndarray  # indices
    samples: int


class _Bucket(NamedTuple):
    size: Size
    groups: list[_Group]
    start: int  # where its samples begin among those of an epoch, before batches are shuffled
    stop: int


class _Epoch(NamedTuple):
    number: int
    indices: np.ndarray  # (samples,) int32, bucket by bucket
    repeats: np.ndarray  # (samples,) int32
    batches: np.ndarray  # (batches,) in the order in which they are trained on


class Order:
    """The order of training on n pictures with bucket sizes (n, 2), from `sources` (n,) if several.

    Without `weights` every epoch has each picture exactly `repeats[source]` times (1 by default).
    With `weights`, one positive number per source, `repeats` do not count: an epoch is then the
    smallest in which the sources' samples are in these proportions and every picture is there at
    least once. A source's samples are split over its buckets in proportion, rounded half up.

    The samples of each source in each bucket are an endless sequence of passes, each pass a
    permutation of its own, of which every epoch takes the next so many. So each epoch has the same
    number of batches, and over the epochs the pictures that share a source and a bucket are seen
    equally often, give or take one.
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
        self._buckets = list(_grouped(sizes, sources, _factors(sources, weights, repeats)))
        self._starts = np.concatenate(
            [np.arange(bucket.start, bucket.stop, batch_size) for bucket in self._buckets]
            + [[self.samples_per_epoch]]
        )
        self._epoch: _Epoch | None = None

    @property
    def samples_per_epoch(self) -> int:
        """Samples per epoch, repeats counted; the same for every epoch."""
        return self._buckets[-1].stop

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same for every epoch and any number of processes."""
        return len(self._starts) - 1

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of an optimizer step; all count from 0."""
        return divmod(step, self.batches_per_epoch)

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
        inside = slice(self._starts[batch], self._starts[batch + 1])
        indices, repeats = self._epoch.indices[inside], self._epoch.repeats[inside]
        return indices.astype(np.int64), repeats.astype(np.int64)

    def _shuffled(self, number: int) -> _Epoch:
        indices = np.empty(self.samples_per_epoch, np.int32)
        repeats = np.empty(self.samples_per_epoch, np.int32)
        for bucket in self._buckets:
            at = bucket.start
            for group in bucket.groups:
                for part, seen in self._passes(group, bucket.size, number):
                    indices[at : at + len(part)], repeats[at : at + len(part)] = part, seen
                    at += len(part)
            inside = slice(bucket.start, bucket.stop)
            mixed = self._permutation(bucket.stop - bucket.start, "mix", *bucket.size, number)
            indices[inside], repeats[inside] = indices[inside][mixed], repeats[inside][mixed]
        batches = self._permutation(self.batches_per_epoch, "batches", number)
        return _Epoch(number, indices, repeats, batches)

    def _passes(
        self, group: _Group, size: Size, epoch: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The epoch's part of the group's passes: indices, and how often each was there before."""
        count = len(group.pictures)
        start, stop = epoch * group.samples, (epoch + 1) * group.samples
        seen = np.zeros(count, np.int32)
        for number in range(start // count, -(-stop // count)):
            shuffled = self._permutation(count, "pass", group.source, *size, number)
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


def _grouped(sizes: np.ndarray, sources: np.ndarray, factors: np.ndarray) -> Iterator[_Bucket]:
    codes, of_bucket = np.unique(pack(sizes), return_inverse=True)
    of_group = of_bucket * len(factors) + sources
    members = np.argsort(of_group, kind="stable").astype(np.int32)
    groups, starts = np.unique(of_group[members], return_index=True)
    parts = np.split(members, starts[1:])
    at, start = 0, 0
    for number, code in enumerate(codes):
        inside = []
        while at < len(groups) and groups[at] // len(factors) == number:
            source, pictures = int(groups[at] % len(factors)), parts[at]
            samples = max(int(len(pictures) * factors[source] + 0.5), len(pictures))
            inside.append(_Group(source, pictures, samples))
            at += 1
        stop = start + sum(group.samples for group in inside)
        yield _Bucket(unpack(code), inside, start, stop)
        start = stop
