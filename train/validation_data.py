"""The pictures of the held-out loss, with noise and timesteps that never change.

Light until `held_out` is called: a plan uses the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from data import counter
from data.listing import few
from train import pictures as scanning
from train.config import DataConfig, RunConfig, UserError
from train.pictures import Pictures

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.loader import TrainingSet
    from data.noising import Noising
    from data.wording import Wording
    from train.method import Pipeline
    from train.node_caches import Share

HELD_OUT, TRAIN = "held_out", "train"
_NAME = ".held-out"  # of the held-out source; no other's begins with a dot

Batch = dict[str, Any]


def settings(config: RunConfig) -> DataConfig | None:
    """The data section of the held-out pictures: the run's own, but for where they are. None where
    nothing is validated."""
    path = config.validation.path or config.evaluation.path
    return None if path is None or not config.validation.every else data_at(config, str(path))


def data_at(config: RunConfig, path: str) -> DataConfig:
    """The run's data section for other pictures.

    Where the run has several sources, it is what they inherit, not what each has for itself.
    """
    data, sources = config.data, config.data.named_sources()
    own: dict[str, Any] = {
        "captions": data.captions.model_copy(update={"max_tokens": sources[0].tokens})
    }
    if len(sources) == 1:
        names = ("caption", "captions", "split", "resolution", "crop")
        own = {name: getattr(sources[0], name) for name in names}
    where = {"path": path, "sources": [], "streaming": False, "flip": False}
    return data.model_copy(update=own | where)


def find(config: RunConfig) -> Pictures | None:
    """All held-out pictures, scanned and in their buckets; None where nothing is validated. Raises
    UserError for whatever cannot be used, as with the pictures that are trained on."""
    wanted = settings(config)
    if wanted is None:
        return None
    try:
        return scanning.find(wanted)
    except UserError as error:
        key = "validation.path" if config.validation.path else "evaluation.path"
        raise UserError(
            f"the held-out pictures, {key}={wanted.path} (validation.every=0 does without): {error}"
        ) from None


def describe(config: RunConfig, held_out: Pictures, trained: Pictures) -> list[str]:
    """Lines of a plan: what is measured and when, and which of it is trained on, too."""
    count, validation = len(held_out.sizes), config.validation
    path = validation.path or config.evaluation.path
    line = f"held out {min(count, validation.images)} of {count} pictures in {path}"
    line += f", every {validation.every} steps"
    hashes = {sha for part in trained.parts for sha in part.source.table.column("sha256")}
    both = [record.id for record in held_out.records if record.sha256 in hashes]
    what = "held-out pictures that are trained on, too, so that their loss says nothing"
    return [line, *([f"note     {few(what, both)}"] if both else [])]


def choose(pictures: Pictures, most: int, seed: int) -> Pictures:
    """At most so many of the pictures: one from each of as many equal parts of them, so that every
    folder and source has its share."""
    total = len(pictures.sizes)
    count = min(most, total)
    edges = np.arange(count + 1) * total // max(count, 1)
    random = counter.generator(seed, "pictures")
    return _subset(pictures, random.integers(edges[:-1], edges[1:]))


def _subset(pictures: Pictures, rows: np.ndarray) -> Pictures:
    """The pictures at these rows, ascending; every part stays, be it empty."""
    parts, first = [], 0
    for part in pictures.parts:
        end = first + len(part.sizes)
        mine = rows[(rows >= first) & (rows < end)] - first
        source = replace(part.source, table=part.source.table.take(mine))
        parts.append(replace(part, source=source, sizes=part.sizes[mine]))
        first = end
    return Pictures(parts)


def timesteps(noising: Noising, pictures: int, each: int, seed: int) -> np.ndarray:
    """`each` timesteps of every picture, int64 (n, each), column k from the k-th of as many equal
    parts of what is trained.

    Within a part the pictures are at the middles of n equal shares, in an order of its own: all of
    them together cover the schedule evenly, and no picture is always at the end of its part.
    """
    orders = [
        counter.generator(seed, "timesteps", part).permutation(pictures) for part in range(each)
    ]
    places = np.stack(orders, axis=1) + pictures * np.arange(each)  # of n * each shares
    return noising.first + (2 * places + 1) * noising.count // (2 * pictures * each)


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """This process's batches of the held-out loss (`train.validation.HeldOut`)."""

    samples: TrainingSet
    """The held-out pictures and, after them, those that are trained on. A picture at its k-th
    timestep is its sample as if an epoch had it for the k-th time."""
    ids: dict[str, list[str]]
    timesteps: dict[str, np.ndarray]
    shapes: Sequence[tuple[int, ...]]
    """Of each sample, what all of a batch must have in common."""
    batch_size: int
    rank: int
    world: int

    def __len__(self) -> int:
        return -(-len(self._batches) // self.world)

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            index = self.rank + turn * self.world
            # Where there is none left for this process it does one again, for nothing.
            yield self._loaded(self._batches[index % len(self._batches)], index)

    @cached_property
    def _batches(self) -> list[list[int]]:
        """The samples of every batch, over all processes."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, shape in enumerate(self.shapes):
            alike.setdefault(shape, []).append(row)
        return [
            rows[start : start + self.batch_size]
            for rows in alike.values()
            for start in range(0, len(rows), self.batch_size)
        ]

    def _loaded(self, rows: list[int], index: int) -> Batch:
        import torch
        from torch.utils.data import default_collate

        batch = dict(default_collate([self._sample(row) for row in rows]))
        there = index < len(self._batches)
        return batch | {"row": torch.tensor(rows if there else [-1] * len(rows))}

    def _sample(self, row: int) -> dict[str, Any]:
        picture, repeat = divmod(row, self._timesteps.shape[1])
        timestep = int(self._timesteps[picture, repeat])
        return self.samples.sample(0, picture, repeat) | {"timestep": timestep}

    @cached_property
    def _timesteps(self) -> np.ndarray:
        return np.concatenate([self.timesteps[HELD_OUT], self.timesteps[TRAIN]])


def held_out(
    config: RunConfig,
    pictures: Pictures,
    training_set: TrainingSet,
    pipeline: Pipeline,
    accelerator: Accelerator,
    share: Share,
) -> HeldOutSet | None:
    """What the held-out loss is measured on, the cache filled with it; None where nothing is
    validated.

    It is validation.images of the held-out pictures and as many of `pictures`, which are trained
    on, cropped, masked and worded as `training_set` does it. But they are never mirrored, their
    captions are neither dropped nor shuffled, and their input is not perturbed. share: this
    process's part in filling the cache. A place where all processes meet.
    """
    found = find(config)
    if found is None:
        return None
    seed = counter.integer(2**62, config.seed, "validation")
    most, each = config.validation.images, config.validation.timesteps
    own, trained = _named(choose(found, most, seed)), choose(pictures, most, seed)
    both = Pictures([*own.parts, *trained.parts])
    samples = _samples(both, training_set, seed, pipeline, config.data, accelerator, share)
    lengths = _fill_text(both, samples, each, pipeline, accelerator, share)
    ids = [record.id.removeprefix(f"{_NAME}/") for record in both.records]
    count, world = len(own.sizes), accelerator.num_processes
    return HeldOutSet(
        samples=samples,
        ids={HELD_OUT: ids[:count], TRAIN: ids[count:]},
        timesteps={
            side: timesteps(samples.noising, len(part.sizes), each, seed)
            for side, part in ((HELD_OUT, own), (TRAIN, trained))
        },
        shapes=[(*both.sizes[row // each].tolist(), length) for row, length in enumerate(lengths)],
        batch_size=config.train.micro_batch_size or -(-config.train.batch_size // world),
        rank=accelerator.process_index,
        world=world,
    )


def _named(found: Pictures) -> Pictures:
    """Under a name that cannot be another source's."""
    (part,) = found.parts
    return Pictures([replace(part, settings=part.settings.model_copy(update={"name": _NAME}))])


def _samples(
    both: Pictures,
    training_set: TrainingSet,
    seed: int,
    pipeline: Pipeline,
    data: DataConfig,
    accelerator: Accelerator,
    share: Share,
) -> TrainingSet:
    """The pictures as they are trained on, but for what only training does with them."""
    from data.order import Order
    from train.feeding import fill_latents, latent_keys

    keys = latent_keys(both, pipeline, data)
    unturned = data.model_copy(update={"flip": False})
    fill_latents(keys, training_set.store, pipeline, unturned, accelerator, share)
    return replace(
        training_set,
        records=both.records,
        order=Order(both.sizes, seed=seed, batch_size=1),
        sources=both.records.sources,
        wordings=[settled(wording) for wording in both.wordings],
        latent_keys=keys,
        seed=seed,
        noising=replace(training_set.noising, perturbation=0.0),
        flip=False,
        caption_dropout=0.0,
        beside=None,
    )


def settled(wording: Wording) -> Wording:
    """Without what differs from time to time."""
    return replace(wording, shuffle_tags=False, tag_dropout=0.0)


def _fill_text(
    both: Pictures,
    samples: TrainingSet,
    each: int,
    pipeline: Pipeline,
    accelerator: Accelerator,
    share: Share,
) -> list[int]:
    """Caches the captions where training reads them from there; returns how many tokens the text of
    each sample has."""
    from data.tokens import tokenize
    from train.feeding import fill_captions

    tokens = both.tokens
    captions = list(_captions(both, samples, each))
    if samples.embedding_key is not None:
        unique = sorted(set(captions))
        fill_captions(unique, samples.store, pipeline, accelerator, share, max_tokens=tokens)
    lengths = {
        caption: tokenize(pipeline.tokenizer, [caption], max_tokens=tokens).shape[1]
        for caption in set(captions)
    }
    return [lengths[caption] for caption in captions]


def _captions(both: Pictures, samples: TrainingSet, each: int) -> Iterator[str]:
    """The caption of every sample."""
    for source, record in zip(both.records.sources.tolist(), both.records, strict=True):
        for repeat in range(each):
            yield samples.wordings[source].caption(
                record.captions, seed=samples.seed, epoch=0, id=record.id, repeat=repeat
            )
