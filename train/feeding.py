"""From pictures to the batches of a run: fills the cache with what it lacks, then reads from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from data.files import progress
from train import resting
from train.config import DataConfig, RunConfig
from train.families import INPAINTING_CHANNELS
from train.node_caches import Share, share_of
from train.pictures import Pictures
from train.stopping import checking, jointly
from train.streams import stream_in
from train.utilisation import Work, unknown, work_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.cache import LatentKeys
    from data.loader import TrainingSet
    from data.store import TensorStore
    from train.class_pictures import ClassPictures
    from train.method import Pipeline
    from train.validation import HeldOut


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
    held_out: HeldOut | None = None
    at_peak: Work = unknown

    def epochs(self, steps: int) -> float:
        """How many epochs so many optimizer steps are."""
        return self.training_set.order.epochs(steps)

    def work(self, micro_batches: list[dict[str, Any]]) -> float:
        """The seconds that they would take the device at its peak rate; 0 where that is unknown."""
        return self.at_peak(micro_batches)

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
    classes: ClassPictures | None = None,
) -> StepBatches:
    """Fills the cache with what it lacks, then the batches of the run. Of the encoders, those that
    training needs are on the device then; the UNet is not there yet.

    cache_captions: False where the text encoder trains. Batches hold token ids then, as they do
    where captions change too much from epoch to epoch to be cached. classes: what DreamBooth trains
    on beside the pictures.
    """
    from data.store import TensorStore
    from train.validation_data import held_out

    store = TensorStore(config.data.cache)
    share = share_of(store.folder, accelerator)
    if config.data.streaming:
        pictures = stream_in(pictures, store, pipeline, config.data, accelerator, share)
        accelerator.print(f"streamed {pictures.summary()}")
    training_set = _training_set(
        pictures, pipeline, config, accelerator, store, share, cache_captions, classes
    )
    world = accelerator.num_processes
    steps = StepBatches(
        training_set,
        steps=config.train.steps,
        rank=accelerator.process_index,
        world=world,
        micro_batch_size=config.train.micro_batch_size or -(-config.train.batch_size // world),
        workers=config.data.workers,
        held_out=held_out(config, pictures, training_set, pipeline, accelerator, share),
        at_peak=work_of(config, accelerator),
    )
    # FSDP wants all of the layers that it is told to wrap, and splits them anyway.
    text = training_set.embedding_key is None or accelerator.distributed_type == "FSDP"
    resting.settle(pipeline, accelerator.device, text=text)
    return steps


def _training_set(
    pictures: Pictures,
    pipeline: Pipeline,
    config: RunConfig,
    accelerator: Accelerator,
    store: TensorStore,
    share: Share,
    cache_captions: bool,
    classes: ClassPictures | None,
) -> TrainingSet:
    """What is trained on, the cache filled with it. A place where all processes meet."""
    from data.loader import TrainingSet
    from data.noising import Noising

    data = config.data
    everything = pictures if classes is None else classes.joined(pictures)
    keys = latent_keys(everything, pipeline, data)
    fill_latents(keys, store, pipeline, data, accelerator, share)
    if accelerator.is_main_process:
        report_cut_captions(everything, pipeline.tokenizer)
    order = pictures.order(seed=config.seed, batch_size=config.pictures_per_step)
    return TrainingSet(
        records=everything.records,
        order=order,
        sources=everything.records.sources,
        wordings=everything.wordings,
        store=store,
        latent_keys=keys,
        seed=config.seed,
        scaling_factor=pipeline.vae.config.scaling_factor,
        noising=Noising.of(config.diffusion, pipeline.scheduler.config.num_train_timesteps),
        flip=data.flip,
        masks=data.masks,
        random_masks=random_masks(pipeline, data),
        caption_dropout=data.caption_dropout,
        beside=None if classes is None else classes.beside(pictures, order),
        **_text(everything, pipeline, store, accelerator, share, cached=cache_captions),
    )


def latent_keys(pictures: Pictures, pipeline: Pipeline, data: DataConfig) -> LatentKeys:
    from data.cache import LatentKeys
    from train.models import latent_fingerprint

    return LatentKeys(
        pictures.records,
        pictures.sizes,
        latent_fingerprint(pipeline.vae, data.cache_precision),
        crops=[part.settings.crop or data.crop for part in pictures.parts],
        sources=pictures.records.sources,
        crop_variants=data.crop_variants,
        background=data.background,
    )


def random_masks(pipeline: Pipeline, data: DataConfig) -> int:
    """How many random masks each picture has: none but for the inpainting model."""
    return data.random_masks if pipeline.unet.config.in_channels == INPAINTING_CHANNELS else 0


def fill_latents(
    keys: LatentKeys,
    store: TensorStore,
    pipeline: Pipeline,
    data: DataConfig,
    accelerator: Accelerator,
    share: Share,
) -> None:
    """Encodes what the cache lacks of the pictures. A place where all processes meet."""
    from data.cache import cache_latents
    from data.inpainting import cache_masked
    from train.models import latent_encoder

    encode = latent_encoder(pipeline.vae, data.cache_precision)
    main = accelerator.is_main_process
    how: dict[str, Any] = {
        "flip": data.flip,
        "batch_size": data.cache_batch_size,
        **share._asdict(),
    }

    def mine() -> None:
        bar = checking(progress("caching latents", main))
        cache_latents(keys, store, encode, progress=bar, **how)
        if masks := random_masks(pipeline, data):
            bar = checking(progress("caching masked pictures", main))
            cache_masked(keys, store, encode, count=masks, progress=bar, **how)

    jointly(accelerator, mine)
    store.refresh()


def _text(
    pictures: Pictures,
    pipeline: Pipeline,
    store: TensorStore,
    accelerator: Accelerator,
    share: Share,
    *,
    cached: bool,
) -> dict[str, Callable[..., Any]]:
    """How the training set turns captions into conditioning: from the cache, or as token ids."""
    from data.tokens import tokenize

    tokens = pictures.tokens
    captions = pictures.captions if cached else None
    if captions is None:
        return {"tokenize": partial(tokenize, pipeline.tokenizer, max_tokens=tokens)}
    key = fill_captions(captions, store, pipeline, accelerator, share, max_tokens=tokens)
    return {"embedding_key": key}


def fill_captions(
    captions: list[str],
    store: TensorStore,
    pipeline: Pipeline,
    accelerator: Accelerator,
    share: Share,
    *,
    max_tokens: int,
) -> Callable[[str], str]:
    """Encodes what the cache lacks of the captions, and returns a caption's key there. A place
    where all processes meet."""
    from data.cache import cache_captions, text_key
    from train.models import caption_encoder, fingerprint, tokenizer_fingerprint

    prints: dict[str, Any] = {
        "text_encoder_fingerprint": fingerprint(pipeline.text_encoder),
        "tokenizer_fingerprint": f"{tokenizer_fingerprint(pipeline.tokenizer)}-{max_tokens}",
    }
    mine = partial(
        cache_captions,
        captions,
        store,
        caption_encoder(pipeline.tokenizer, pipeline.text_encoder, max_tokens=max_tokens),
        **share._asdict(),
        progress=checking(progress("caching captions", accelerator.is_main_process)),
        **prints,
    )
    jointly(accelerator, mine)
    store.refresh()
    return partial(text_key, **prints)


def report_cut_captions(pictures: Pictures, tokenizer: Any) -> None:
    """Says which captions are longer than what is read of them, as training words them."""
    from data.listing import few
    from data.tokens import cut_captions

    longest: dict[str, int] = {}
    worded = pictures.worded()
    while some := list(islice(worded, 4096)):
        for index, tokens in cut_captions(tokenizer, [text for _, text in some], pictures.tokens):
            longest[some[index][0]] = max(tokens, longest.get(some[index][0], 0))
    if longest:
        named = [f"{id} ({tokens} tokens)" for id, tokens in longest.items()]
        enough = [limit for limit in (150, 225) if limit >= max(longest.values())]
        remedy = f"data.captions.max_tokens={enough[0]} reads all" if enough else "shorten them"
        note = few(f"captions cut at {pictures.tokens} tokens", named)
        print(f"note     {note}; {remedy}", flush=True)
