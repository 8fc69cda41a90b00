"""The training set as a function of the step: which samples, with which noise, for which process.

Which pictures a step has is `data.order`'s to say, for all processes together. Everything random
comes from `data.counter`, so a run resumed at step k, or spread over more processes or workers,
trains on exactly the same numbers.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import counter
from data.ahead import ahead
from data.cache import DEPTH, EMBEDDINGS, FLIPPED, MASK, MOMENTS
from data.inpainting import tensor_name
from data.order import Order, share
from data.records import Record
from train import stopping
from train.config import UserError

if TYPE_CHECKING:
    from data.noising import Noising
    from data.pairing import Partners
    from data.store import TensorStore
    from data.wording import Wording

Batch = dict[str, Any]  # tensors (B, ...) and "ids", a list of B names
_ALIGNED = 16  # bytes, as any number wants
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as in diffusers' DiagonalGaussianDistribution


class Keys(Protocol):
    """Which cache entries a picture has (`data.cache.LatentKeys`)."""

    def keys(self, index: int, record: Record | None = None) -> list[str]: ...


class _Seen(NamedTuple):
    """A record at one step."""

    row: int
    record: Record
    purpose: tuple[int | str, ...]  # what its randomness is drawn for
    caption: str
    timestep: int
    beside: bool  # whether it is there as a partner


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What is trained on beside the samples of the order: DreamBooth's class pictures."""

    partners: Partners
    weight: float
    """Of the mean loss over them, where that over the order's samples has 1."""
    predicted: bool = False
    """Their target is what the frozen base predicts."""


@dataclass(kw_only=True)
class TrainingSet:
    """What is trained on, and with which randomness.

    Captions come as embeddings from the store where `embedding_key` is given, else as the ids that
    `tokenize` makes of them, for a text encoder in training.
    """

    records: Sequence[Record]
    order: Order
    wordings: Sequence[Wording]
    """What becomes of the captions of each source."""
    store: TensorStore
    latent_keys: Keys
    seed: int
    scaling_factor: float
    """The VAE's."""
    noising: Noising
    """Which timesteps and noise."""
    sources: np.ndarray | None = None
    """Which source each record is from, (n,); None where there is one."""
    embedding_key: Callable[[str], str] | None = None
    """From a caption to the key of its embeddings (77 k, D), k windows of 77 tokens; "" has one."""
    tokenize: Callable[[list[str]], torch.Tensor] | None = None
    """From B captions to ids (B, 77 k), int64, k the most windows that any of them needs."""
    flip: bool = False
    """Mirror half of the pictures, drawn anew at every step."""
    masks: bool = False
    """Give every sample a mask: of ones where the picture has none, or its target is predicted, as
    a mask is of the subject."""
    random_masks: int = 0
    """For the inpainting model: how many masks of each picture there are; one is drawn at every
    step."""
    caption_dropout: float = 0.0
    """Share of captions replaced by "", from 0 to 1."""
    beside: Beside | None = None
    """One more sample with each of the order's. Its records follow those of the order."""

    def __post_init__(self) -> None:
        assert len(self.records) > 0
        assert (self.embedding_key is None) != (self.tokenize is None)
        assert self.sources is not None or len(self.wordings) == 1

    def gather(self, step: int, *, rank: int, world: int) -> Batch:
        """All that process `rank` of `world` does at one step.

        What `sample` says, stacked, with "ids" and "weight" (B,): the sum of loss x weight over all
        processes is the mean over the global batch; with `beside` the mean over the order's samples
        and so much of the mean over their partners. Where the batch does not divide by `world`,
        some of its samples stand twice, the second time with weight 0, so that all processes have
        as many. Captions are as long as the longest of the global batch. Where partners are
        `predicted`, "prior" (B,) is True for them.
        """
        seen, each = self._batch(step)
        positions, weights = share(len(seen), rank=rank, world=world)
        weights = np.where(weights > 0, each[positions], np.float32(0))
        batch = _stack([self._picture(seen[position]) for position in positions])
        batch |= self._text([one.caption for one in seen], positions)
        ids = [seen[position].record.id for position in positions]
        return batch | {"weight": torch.from_numpy(weights), "ids": ids}

    def sample(self, step: int, index: int, repeat: int = 0) -> dict[str, Any]:
        """One record as it is trained on at one step, having been there `repeat` times in its
        epoch.

        "latents" and "noise" (C, h, w), "input_noise" where the input's differs, and
        "prompt_embeds" (L, D), all float32, or "input_ids" (L,); "timestep" and "source" int64;
        "mask" (1, h, w) from 0 to 1 if there are `masks`, and "depth" (1, h, w) from -1 to 1 where
        the record has one. Raises UserError where the cache lacks any of it.
        """
        seen = self._seen(step, index, repeat, position=0, total=1)
        text = self._text([seen.caption], [0])
        return self._picture(seen) | {name: values[0] for name, values in text.items()}

    def _batch(self, step: int) -> tuple[list[_Seen], np.ndarray]:
        """The global batch of a step, partners last, and what each sample weighs."""
        own = self._all(step, *self.order.batch(step))
        weights = np.full(len(own), 1 / len(own), np.float32)
        if self.beside is None:
            return own, weights
        partners = self._all(step, *self.beside.partners.batch(step), beside=True)
        return own + partners, np.concatenate([weights, np.float32(self.beside.weight) * weights])

    def _all(
        self, step: int, indices: np.ndarray, repeats: np.ndarray, beside: bool = False
    ) -> list[_Seen]:
        return [
            self._seen(step, int(index), int(repeat), position, len(indices), beside)
            for position, (index, repeat) in enumerate(zip(indices, repeats, strict=True))
        ]

    def _seen(
        self, step: int, index: int, repeat: int, position: int, total: int, beside: bool = False
    ) -> _Seen:
        """The sample at `position` of the `total` of its global batch, or of all partners there, so
        that stratified timesteps cover the schedule in each of the two."""
        record = self.records[index]
        purpose = (step, record.id, repeat) if repeat else (step, record.id)
        timestep = self.noising.timestep(self.seed, step, purpose, position=position, total=total)
        if counter.uniform(self.seed, "caption", *purpose) < self.caption_dropout:
            return _Seen(index, record, purpose, "", timestep, beside)
        epoch, _ = self.order.position(step)
        caption = self.wordings[self._source(index)].caption(
            record.captions, seed=self.seed, epoch=epoch, id=record.id, repeat=repeat
        )
        return _Seen(index, record, purpose, caption, timestep, beside)

    def _source(self, index: int) -> int:
        return 0 if self.sources is None else int(self.sources[index])

    def _picture(self, seen: _Seen) -> dict[str, Any]:
        latents, beside = self._latents(seen)
        noise = {
            name: torch.from_numpy(values)
            for name, values in self.noising.noise(latents.shape, self.seed, seen.purpose).items()
        }
        facts = {"timestep": seen.timestep, "source": self._source(seen.row)}
        if self.beside is not None and self.beside.predicted:
            facts["prior"] = self._predicted(seen)
        return {"latents": latents, **noise, **facts, **beside}

    def _predicted(self, seen: _Seen) -> bool:
        return seen.beside and self.beside is not None and self.beside.predicted

    def _latents(self, seen: _Seen) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The latents (C, h, w), drawn and scaled, and what lies beside them (1, h, w)."""
        keys = self.latent_keys.keys(seen.row, seen.record)
        crop = counter.integer(len(keys), self.seed, "crop", *seen.purpose) if keys[1:] else 0
        mirrored = self.flip and counter.uniform(self.seed, "flip", *seen.purpose) < 0.5
        moments = FLIPPED if mirrored else MOMENTS
        wanted = {moments}
        masked = self.masks and not self._predicted(seen)
        wanted |= {MASK} if masked and seen.record.mask_sha256 is not None else set()
        wanted |= {DEPTH} if seen.record.depth_sha256 is not None else set()
        hidden = self._hidden(seen, mirrored)
        tensors = self._cached(keys[crop], wanted | hidden, seen.record.id)
        latents = self._drawn(tensors.pop(moments), seen, "latent")
        painted = [tensors.pop(name) for name in hidden]
        beside = {name: tensor.flip(-1) if mirrored else tensor for name, tensor in tensors.items()}
        for tensor in painted:  # one, or none
            beside["inpaint_mask"] = tensor[:1]
            beside["masked_latents"] = self._drawn(tensor[1:], seen, "masked latent")
        if self.masks and MASK not in beside:
            beside[MASK] = torch.ones(1, *latents.shape[1:])
        return latents, beside

    def _hidden(self, seen: _Seen, mirrored: bool) -> set[str]:
        """The name of the random mask that the sample has, where it has one."""
        if not self.random_masks:
            return set()
        number = counter.integer(self.random_masks, self.seed, "random mask", *seen.purpose)
        return {tensor_name(number, flipped=mirrored)}

    def _drawn(self, moments: torch.Tensor, seen: _Seen, what: str) -> torch.Tensor:
        mean, log_variance = moments.chunk(2)  # (C, h, w) each
        deviation = (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()
        normal = torch.from_numpy(counter.normal(mean.shape, self.seed, what, *seen.purpose))
        return (mean + deviation * normal) * self.scaling_factor

    def _text(self, captions: list[str], positions: Sequence[int] | np.ndarray) -> Batch:
        """The captions at these positions, as long as the longest of them all."""
        if self.tokenize is not None:
            return {"input_ids": self.tokenize(captions)[torch.as_tensor(positions)]}
        longest = max(map(self._length, dict.fromkeys(captions)))
        mine = [self._embeddings(captions[position]) for position in positions]
        if any(len(one) < longest for one in mine):
            # By windows of the empty caption, as user interfaces join long and short prompts.
            empty = self._embeddings("")
            mine = [_lengthened(one, empty, longest) for one in mine]
        return {"prompt_embeds": torch.stack(mine)}

    def _length(self, caption: str) -> int:
        assert self.embedding_key is not None
        shape = self.store.shape(self.embedding_key(caption), EMBEDDINGS)
        if shape is None:
            raise self._lost(f"the caption {caption!r}")
        return shape[0]

    def _embeddings(self, caption: str) -> torch.Tensor:
        assert self.embedding_key is not None
        key = self.embedding_key(caption)
        return self._cached(key, {EMBEDDINGS}, f"the caption {caption!r}")[EMBEDDINGS]

    def _cached(self, key: str, names: set[str], what: str) -> dict[str, torch.Tensor]:
        tensors = self.store.get(key, names) or {}
        if names - tensors.keys():
            raise self._lost(what)
        return {name: tensor.float() for name, tensor in tensors.items()}

    def _lost(self, what: str) -> UserError:
        return UserError(
            f"the cache in {self.store.folder} has lost what was made of {what}: run the command "
            "again, and it will be encoded anew"
        )


def _lengthened(embeddings: torch.Tensor, empty: torch.Tensor, length: int) -> torch.Tensor:
    """(L, D) to (length, D), filled up with windows of the empty caption."""
    windows, rest = divmod(length - len(embeddings), len(empty))
    assert rest == 0
    return torch.cat([embeddings, *[empty] * windows])


def _stack(samples: list[dict[str, Any]]) -> Batch:
    return {
        name: torch.stack([torch.as_tensor(sample[name]) for sample in samples])
        for name in samples[0]
    }


def cut(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """A batch as consecutive micro-batches; the last may be short."""
    starts = range(0, len(batch["ids"]), micro_batch_size)
    return [
        _with_prior_rows(
            {name: values[start : start + micro_batch_size] for name, values in batch.items()}
        )
        for start in starts
    ]


def _with_prior_rows(batch: Batch) -> Batch:
    """Which rows are to be predicted by the prior, found here: on a device, the host would have to
    wait for how many there are."""
    if "prior" in batch:
        batch["prior_rows"] = batch["prior"].nonzero().flatten()
    return batch


class _Steps(Dataset[Batch | UserError]):
    """This process's share of each step, packed. One batch per step, however many micro-batches,
    and one tensor: each that comes from a worker costs a file descriptor and a third of a
    millisecond."""

    def __init__(self, training_set: TrainingSet, rank: int, world: int) -> None:
        self.training_set, self.rank, self.world = training_set, rank, world

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return packed(self.training_set.gather(step, rank=self.rank, world=self.world))
        except UserError as error:  # raised in a worker, it would arrive wrapped in a traceback
            return error


def packed(batch: Batch) -> Batch:
    """All tensors of a batch as one of bytes, and where each lies in it."""
    layout, parts, end = {}, [], 0
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor):
            content = tensor.contiguous().flatten().view(torch.uint8)
            layout[name] = (tensor.dtype, tensor.shape, end, end + len(content))
            padding = -len(content) % _ALIGNED
            parts += [content, content.new_zeros(padding)]
            end += len(content) + padding
    others = {name: values for name, values in batch.items() if name not in layout}
    return {"bytes": torch.cat(parts), "layout": layout, "others": others}


def unpacked(batch: Batch) -> Batch:
    """What was `packed`, on the same bytes."""
    tensors = {
        name: batch["bytes"][start:end].view(dtype).view(shape)
        for name, (dtype, shape, start, end) in batch["layout"].items()
    }
    return tensors | batch["others"]


def _begin_worker(parent: int, _: int) -> None:
    stopping.ignore(parent)


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
        worker_init_fn=partial(_begin_worker, os.getpid()) if workers else None,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),  # so that a GPU takes them while it computes
    )
    with stopping.forking():
        made = iter(steps)
    # What a worker made takes some milliseconds to receive. With a GPU, pinning has such a thread.
    taken = ahead(made) if workers and not torch.cuda.is_available() else (one for one in made)
    atexit.register(
        _end_workers, weakref.ref(taken), weakref.ref(made), getattr(made, "_workers", ())
    )
    try:
        for batch in taken:
            if isinstance(batch, UserError):
                raise batch
            yield cut(unpacked(batch), micro_batch_size)
    finally:
        taken.close()
        del taken, made  # which ends them, also where an error would keep this frame


def _end_workers(
    taken: weakref.ref[Any], of: weakref.ref[Any], workers: Sequence[BaseProcess]
) -> None:
    """They end with their iterator. Where something keeps that alive to the end of the process, or
    it did not reach them, Python would ask them to end by a signal that they ignore, and wait for
    ever."""
    for one, name in ((taken(), "close"), (of(), "_shutdown_workers")):
        end = getattr(one, name, None)
        if end is not None:
            end()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
