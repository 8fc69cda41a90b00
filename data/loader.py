"""The training set as a function of the step: which samples, with which noise, for which process.

A batch is defined globally: `batch_size` pictures of one bucket per optimizer step, whatever the
number of processes. Everything random comes from `data.counter`, so a run resumed at step k, or
spread over more processes or workers, trains on exactly the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data import counter
from data.cache import EMBEDDINGS, FLIPPED, MOMENTS, TensorCache
from data.images import Size
from data.sources import Record
from train.config import UserError

Batch = dict[str, Any]  # tensors (B, ...) and "ids", a list of B names
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in diffusers' DiagonalGaussianDistribution


@dataclass(kw_only=True)
class TrainingSet:
    """What is trained on, and with which randomness.

    Captions come as embeddings from the cache where `embedding_keys` is given (caption to key, ""
    included), else as the ids (B, L) that `tokenize` makes of them, for a text encoder in training.
    """

    records: Sequence[Record]
    sizes: Sequence[Size]  # the bucket of each record, in pixels
    cache: TensorCache
    latent_keys: Sequence[str]  # of each record
    seed: int
    batch_size: int  # images per optimizer step, over all processes
    scaling_factor: float  # the VAE's
    num_train_timesteps: int
    embedding_keys: Mapping[str, str] | None = None
    tokenize: Callable[[list[str]], torch.Tensor] | None = None
    flip: bool = False  # mirror half of the pictures, drawn anew at every step
    caption_dropout: float = 0.0  # share of captions replaced by "", from 0 to 1
    _plan: tuple[int, list[list[int]]] = field(default=(-1, []), init=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.records) == len(self.sizes) == len(self.latent_keys) > 0
        assert len({record.id for record in self.records}) == len(self.records)
        assert (self.embedding_keys is None) != (self.tokenize is None)
        assert self.batch_size > 0
        self._buckets: dict[Size, list[int]] = {}
        for index in sorted(range(len(self.sizes)), key=lambda index: self.sizes[index]):
            self._buckets.setdefault(self.sizes[index], []).append(index)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps per epoch, the same for every epoch and any number of processes."""
        return sum(-(-len(inside) // self.batch_size) for inside in self._buckets.values())

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of an optimizer step; all count from 0."""
        return divmod(step, self.batches_per_epoch)

    def epoch_plan(self, epoch: int) -> list[list[int]]:
        """The epoch's global batches, as indices of records: a function of (seed, epoch).

        Every picture once; each batch from one bucket. The last batch of a bucket may be short.
        """
        if self._plan[0] != epoch:
            self._plan = (epoch, self._shuffled(epoch))
        return self._plan[1]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = counter.generator(self.seed, "order", epoch)
        batches = []
        for inside in self._buckets.values():
            shuffled = [inside[position] for position in order.permutation(len(inside))]
            for start in range(0, len(shuffled), self.batch_size):
                batches.append(shuffled[start : start + self.batch_size])
        return [batches[position] for position in order.permutation(len(batches))]

    def sample(self, step: int, index: int) -> dict[str, Any]:
        """One record as it is trained on at one step.

        "latents" and "noise" (C, h, w) and "prompt_embeds" (L, D), all float32, or "input_ids"
        (L,); "timestep" int64; "id". Raises UserError where the cache lacks the entry.
        """
        purpose = (step, self.records[index].id)
        latents = self._latents(index, purpose)
        return {
            "id": self.records[index].id,
            "latents": latents,
            "noise": torch.from_numpy(counter.normal(latents.shape, self.seed, "noise", *purpose)),
            "timestep": counter.integer(self.num_train_timesteps, self.seed, "timestep", *purpose),
            **self._text(index, purpose),
        }

    def _latents(self, index: int, purpose: tuple[int, str]) -> torch.Tensor:
        mirrored = self.flip and counter.uniform(self.seed, "flip", *purpose) < 0.5
        moments = self._cached(self.latent_keys[index], FLIPPED if mirrored else MOMENTS)
        mean, log_variance = moments.float().chunk(2)  # (C, h, w) each
        deviation = (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()
        normal = torch.from_numpy(counter.normal(mean.shape, self.seed, "latent", *purpose))
        return (mean + deviation * normal) * self.scaling_factor

    def _text(self, index: int, purpose: tuple[int, str]) -> dict[str, torch.Tensor]:
        dropped = counter.uniform(self.seed, "caption", *purpose) < self.caption_dropout
        caption = "" if dropped else self.records[index].caption
        if self.embedding_keys is not None:
            return {"prompt_embeds": self._cached(self.embedding_keys[caption], EMBEDDINGS).float()}
        assert self.tokenize is not None
        return {"input_ids": self.tokenize([caption])[0]}

    def _cached(self, key: str, name: str) -> torch.Tensor:
        tensors = self.cache.get(key)
        if tensors is None or name not in tensors:
            raise UserError(
                f"the cache entry {self.cache.path(key)} is missing or damaged: run the command "
                "again, and it will be encoded anew"
            )
        return tensors[name]

    def share(self, step: int, *, rank: int, world: int, micro_batch_size: int) -> list[Batch]:
        """The micro-batches of process `rank` of `world` at one step.

        Each has the stacked tensors of `sample`, "ids", and "weight" (B,): the sum of loss x weight
        over all micro-batches of all processes is the mean over the global batch. Where that does
        not divide by `world`, some of its samples stand twice, the second time with weight 0, so
        that all processes have the same number of micro-batches of the same shapes.
        """
        return cut(self.gather(step, rank=rank, world=world), micro_batch_size)

    def gather(self, step: int, *, rank: int, world: int) -> Batch:
        """All that `share` cuts into micro-batches, as one batch."""
        epoch, position = self.position(step)
        real = self.epoch_plan(epoch)[position]
        padding = -len(real) % world
        weighted = [(index, 1 / len(real)) for index in real]
        weighted += [(real[extra % len(real)], 0.0) for extra in range(padding)]
        mine = weighted[rank::world]
        return _stack([self.sample(step, index) for index, _ in mine], [w for _, w in mine])


def _stack(samples: list[dict[str, Any]], weights: list[float]) -> Batch:
    names = [name for name in samples[0] if name != "id"]
    batch: Batch = {
        name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]) for name in names
    }
    return batch | {"weight": torch.tensor(weights), "ids": [sample["id"] for sample in samples]}


def cut(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """A batch as consecutive micro-batches; the last may be short."""
    starts = range(0, len(batch["ids"]), micro_batch_size)
    return [
        {name: values[start : start + micro_batch_size] for name, values in batch.items()}
        for start in starts
    ]


class _Steps(Dataset[Batch | UserError]):
    """This process's share of each step. One batch per step, however many micro-batches: tensors
    from a worker cost a file descriptor each."""

    def __init__(self, training_set: TrainingSet, rank: int, world: int) -> None:
        self.training_set, self.rank, self.world = training_set, rank, world

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.training_set.gather(step, rank=self.rank, world=self.world)
        except UserError as error:  # raised in a worker, it would arrive wrapped in a traceback
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def loader(
    training_set: TrainingSet,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    micro_batch_size: int,
    workers: int = 0,
) -> Iterator[list[Batch]]:
    """The micro-batches of each step from `start` to `stop` - 1, made ahead by `workers` processes.

    The same for any number of workers, and the global random state is left alone. Raises UserError
    as `TrainingSet.sample` does.
    """
    steps = DataLoader(
        _Steps(training_set, rank, world),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    for batch in steps:
        if isinstance(batch, UserError):
            raise batch
        yield cut(batch, micro_batch_size)
