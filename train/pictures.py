"""From a data section to batches: scan and bucket (light), then cache and load (heavy)."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.buckets import assign, make_buckets
from data.sources import Source, scan
from train.config import DataConfig, RunConfig, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.loader import TrainingSet
    from train.method import Pipeline


_TOY_DATA = Path("runs/toy-data")  # where `make setup` writes the embedded default's pictures


@dataclass(frozen=True)
class Pictures:
    """What will be trained on: the source and each picture's bucket (width, height)."""

    source: Source
    sizes: list[tuple[int, int]]

    @property
    def fingerprint(self) -> str:
        """sha256 (16 hex digits) of every picture's id, bytes, caption and bucket."""
        digest = hashlib.sha256()
        for record, size in zip(self.source.records, self.sizes, strict=True):
            digest.update(f"{record.id}\0{record.sha256}\0{record.caption}\0{size}\n".encode())
        return digest.hexdigest()[:16]

    def bucket_counts(self) -> dict[str, int]:
        """Pictures per bucket, named "WIDTHxHEIGHT"."""
        counts = Counter(self.sizes)
        return {f"{width}x{height}": counts[width, height] for width, height in sorted(counts)}

    def summary(self) -> str:
        buckets = ", ".join(f"{size}: {count}" for size, count in self.bucket_counts().items())
        return f"{len(self.sizes)} pictures ({self.source.recognised}); buckets {buckets}"


def find(config: DataConfig) -> Pictures:
    """Scans data.path and gives every picture its bucket. Raises UserError for whatever cannot be
    used."""
    folder = Path(config.path or "")
    if folder.parts[:2] == _TOY_DATA.parts and not folder.exists():
        raise UserError(f"data.path={folder} is not made yet: run `make setup`, which makes it")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    source = scan(
        folder,
        index=config.cache / f"index-{name}.json",
        caption=config.caption,
        progress=_progress("reading pictures", os.environ.get("RANK", "0") == "0"),
    )
    buckets = make_buckets(config.resolutions[-1], step=config.bucket_step)
    return Pictures(source, [assign(r.width, r.height, buckets) for r in source.records])


def cache_bytes(pictures: Pictures, *, flip: bool) -> int:
    """Upper bound of the cache's size: fp16 mean and log-variance of 4 channels at an eighth of
    each side, and SD 2's 77 x 1024 embeddings of each different caption."""
    cells = sum(width * height // 64 for width, height in pictures.sizes)
    captions = len({record.caption for record in pictures.source.records}) + 1
    headers = 1024 * (len(pictures.sizes) + captions)
    return (2 if flip else 1) * cells * 8 * 2 + captions * 77 * 1024 * 2 + headers


@dataclass(frozen=True)
class StepBatches:
    """`batches(start)` for `loop.fit`: this process's micro-batches of every step from `start`
    on."""

    training_set: TrainingSet
    steps: int
    rank: int
    world: int
    micro_batch_size: int
    workers: int

    @property
    def steps_per_epoch(self) -> int:
        return self.training_set.batches_per_epoch

    def __call__(self, start: int) -> Iterable[list[dict[str, Any]]]:
        from data.loader import loader

        return loader(
            self.training_set,
            start=start,
            stop=self.steps,
            rank=self.rank,
            world=self.world,
            micro_batch_size=self.micro_batch_size,
            workers=self.workers,
        )


def batches(
    pictures: Pictures,
    pipeline: Pipeline,
    config: RunConfig,
    accelerator: Accelerator,
    *,
    cache_captions: bool = True,
) -> StepBatches:
    """Fills the cache with what it lacks, then the batches of the run.

    cache_captions: False where the text encoder trains; batches then hold token ids.
    """
    from data import cache as caching
    from data.loader import TrainingSet
    from train.models import fingerprint, tokenize

    data, records = config.data, pictures.source.records
    cache = caching.TensorCache(data.cache)
    vae = fingerprint(pipeline.vae)
    _cache_latents(pictures, cache, pipeline, vae, config, accelerator)
    text: dict[str, Any]
    if cache_captions:
        text = {"embedding_keys": _cache_captions(records, cache, pipeline, accelerator)}
    else:
        text = {"tokenize": partial(tokenize, pipeline.tokenizer)}
    training_set = TrainingSet(
        records=records,
        sizes=pictures.sizes,
        cache=cache,
        latent_keys=caching.latent_keys(records, pictures.sizes, vae),
        seed=config.seed,
        batch_size=config.train.batch_size,
        scaling_factor=pipeline.vae.config.scaling_factor,
        num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
        flip=data.flip,
        caption_dropout=data.caption_dropout,
        **text,
    )
    world = accelerator.num_processes
    return StepBatches(
        training_set,
        steps=config.train.steps,
        rank=accelerator.process_index,
        world=world,
        micro_batch_size=config.train.micro_batch_size or -(-config.train.batch_size // world),
        workers=data.workers,
    )


def _cache_latents(
    pictures: Pictures,
    cache: Any,
    pipeline: Pipeline,
    vae_fingerprint: str,
    config: RunConfig,
    accelerator: Accelerator,
) -> None:
    from data.cache import cache_latents
    from train.models import latent_encoder

    cache_latents(
        pictures.source.records,
        pictures.sizes,
        cache,
        latent_encoder(pipeline.vae),
        vae_fingerprint=vae_fingerprint,
        flip=config.data.flip,
        batch_size=config.data.cache_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        progress=_progress("caching latents", accelerator.is_main_process),
    )
    accelerator.wait_for_everyone()


def _cache_captions(
    records: list[Any], cache: Any, pipeline: Pipeline, accelerator: Accelerator
) -> dict[str, str]:
    from data.cache import cache_captions, text_keys
    from train.models import caption_encoder, fingerprint, tokenizer_fingerprint

    captions = [record.caption for record in records]
    prints: dict[str, Any] = {
        "text_encoder_fingerprint": fingerprint(pipeline.text_encoder),
        "tokenizer_fingerprint": tokenizer_fingerprint(pipeline.tokenizer),
    }
    cache_captions(
        captions,
        cache,
        caption_encoder(pipeline.tokenizer, pipeline.text_encoder),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        progress=_progress("caching captions", accelerator.is_main_process),
        **prints,
    )
    accelerator.wait_for_everyone()
    return text_keys(captions, **prints)


def _progress(what: str, shown: bool) -> Callable[[int, int], None]:
    from tqdm import tqdm

    # A delay keeps the bar out of what is done at once, an error message above all.
    bar = tqdm(desc=what, unit="", disable=not shown, leave=False, delay=1.0)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show
