"""What will be trained on: every source scanned and every picture in its bucket. Light, so that a
plan is made in seconds; train/feeding.py makes batches of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data.buckets import account, buckets_of, too_small
from data.files import progress
from data.order import Order
from data.records import Joined, Table
from data.sources import Rejected, Source, complaint, quarantine, scan
from data.wording import Wording
from train.config import CaptionConfig, Cropping, DataConfig, SourceConfig, UserError

if TYPE_CHECKING:
    from data.streaming import Stream

_TOY_DATA = Path("runs/toy-data")  # where `make setup` writes the embedded default's pictures
CACHED_VARIANTS = 4  # captions with more forms than this are encoded anew at every step


@dataclass(frozen=True)
class Part:
    """One source, and the bucket (width, height) of each of its pictures, (n, 2)."""

    settings: SourceConfig
    source: Source
    sizes: np.ndarray
    stream: Stream | None = None
    """Where its pictures are still to come from; the source has none until then."""


@dataclass(frozen=True)
class Pictures:
    """All sources of a run."""

    parts: list[Part]

    @cached_property
    def records(self) -> Joined:
        return Joined({str(part.settings.name): part.source.table for part in self.parts})

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n, 2), in the order of `records`."""
        return np.concatenate([part.sizes for part in self.parts])

    @cached_property
    def wordings(self) -> list[Wording]:
        """One per source."""
        return [Wording.of(part.settings.captions or CaptionConfig()) for part in self.parts]

    @property
    def weights(self) -> list[float] | None:
        weights = [part.settings.weight for part in self.parts]
        return None if None in weights else [weight or 0.0 for weight in weights]

    @property
    def repeats(self) -> list[int]:
        return [part.settings.repeats for part in self.parts]

    def order(self, *, seed: int, batch_size: int) -> Order:
        """The course of training on them. Raises UserError for weights that it cannot have."""
        return Order(
            self.sizes,
            seed=seed,
            batch_size=batch_size,
            sources=self.records.sources,
            weights=self.weights,
            repeats=self.repeats,
        )

    @cached_property
    def captions(self) -> list[str] | None:
        """Every caption that training can see, sorted; None where they are too many to cache."""
        found: set[str] = set()
        for wording, part in zip(self.wordings, self.parts, strict=True):
            for captions in part.source.table.column("captions"):
                variants = wording.variants(captions, CACHED_VARIANTS)
                if variants is None:
                    return None
                found.update(variants)
        return sorted(found)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (16 hex digits) of every picture's id, bytes, captions, companions and bucket."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.stream.fingerprint}\n".encode() if part.stream else b"")
        for record, size in zip(self.records, self.sizes.tolist(), strict=True):
            beside = (record.focus, record.mask_sha256, record.depth_sha256)
            facts = (record.id, record.sha256, record.captions, beside, size)
            digest.update(f"{facts}\n".encode())
        return digest.hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """How many tokens of a caption are read; the same for all sources."""
        return self.parts[0].settings.tokens

    def worded(self) -> Iterator[tuple[str, str]]:
        """(id, caption) of every form that a caption can have, or one where they are many."""
        several = len(self.parts) > 1
        for wording, part in zip(self.wordings, self.parts, strict=True):
            for record in part.source.table:
                id = f"{part.settings.name}/{record.id}" if several else record.id
                forms = wording.variants(record.captions, CACHED_VARIANTS)
                if forms is None:
                    forms = [wording.caption(record.captions, seed=0, epoch=0, id=record.id)]
                yield from ((id, form) for form in forms)

    @property
    def rejected(self) -> list[Rejected]:
        return [bad for part in self.parts for bad in part.source.rejected]

    @property
    def notes(self) -> list[str]:
        several = len(self.parts) > 1
        return [
            f"{part.settings.name}: {note}" if several else note
            for part in self.parts
            for note in part.source.notes
        ]

    def shares(self) -> list[str]:
        """Of several sources, what each has and what part of the samples it makes."""
        if len(self.parts) < 2 or not len(self.sizes):
            return []
        seen = self.weights or [len(p.sizes) * p.settings.repeats for p in self.parts]
        return [
            f"{part.settings.name}: {len(part.sizes)} pictures, {100 * much / sum(seen):.3g} % of "
            "the samples"
            for part, much in zip(self.parts, seen, strict=True)
        ]

    @property
    def recognised(self) -> str:
        return "; ".join(part.source.recognised for part in self.parts)

    def bucket_counts(self) -> dict[str, int]:
        """Pictures per bucket, named "WIDTHxHEIGHT"."""
        sizes, counts = np.unique(self.sizes, axis=0, return_counts=True)
        return {f"{w}x{h}": int(n) for (w, h), n in zip(sizes.tolist(), counts, strict=True)}

    def account(self) -> dict[str, float]:
        """What becomes of the pictures: the mean share cropped, and how many are enlarged."""
        if not len(self.sizes):
            return {}
        kept = account(self.records.widths, self.records.heights, self.sizes)
        return {
            "mean_share_cropped": round(float(kept.cropped.mean()), 4),
            "enlarged": int(kept.enlarged.sum()),
        }

    def summary(self) -> str:
        if any(part.stream for part in self.parts):
            return f"{self.recognised}; counted as they pass"
        buckets = ", ".join(f"{size}: {count}" for size, count in self.bucket_counts().items())
        return f"{len(self.records)} pictures ({self.recognised}); buckets {buckets}"


def find(config: DataConfig, *, quarantined: Path | None = None) -> Pictures:
    """Scans all sources and gives every picture its bucket.

    quarantined: where data.on_bad_image=quarantine copies what cannot be used. Raises UserError
    for whatever cannot be used, unless it is to be reported.
    """
    parts = [find_part(config, settings) for settings in config.named_sources()]
    if quarantined is not None and config.on_bad_image == "quarantine":
        for part in parts:
            folder = quarantined / str(part.settings.name) if len(parts) > 1 else quarantined
            if part.source.rejected or folder.is_dir():
                quarantine(part.source.rejected, folder)
    return Pictures(parts)


def find_part(config: DataConfig, settings: SourceConfig) -> Part:
    """One source, scanned and bucketed."""
    if Path(settings.path).parts[:2] == _TOY_DATA.parts and not Path(settings.path).exists():
        raise UserError(
            f"data.path={settings.path} is not made yet: run `make setup`, which makes it"
        )
    if (Path(settings.path) / "prepared.json").is_file():
        raise UserError(
            f"data.path={settings.path} is an output of scripts/prepare.py: give its pictures, "
            f"data.path={Path(settings.path) / 'train'}"
        )
    if config.streaming:
        return _streamed(config, settings)
    source = scan(
        settings.path,
        index=index_file(config, settings),
        caption=settings.caption,
        on_bad=policy(config),
        masks=config.masks,
        depth=config.depth,
        split=settings.split or "train",
        revision=config.revision,
        image_column=config.image_column,
        caption_column=config.caption_column,
        progress=progress("reading pictures", os.environ.get("RANK", "0") == "0"),
    )
    if settings.crop == "focus" and not any(source.table.column("focus")):
        note = "data.crop=focus, and no picture has a focus point: the middle of each is kept"
        source = replace(source, notes=[*source.notes, note])
    return bucketed(config, settings, source)


def bucketed(config: DataConfig, settings: SourceConfig, source: Source) -> Part:
    """The source without the pictures too small for any bucket, and each one's bucket."""
    if not config.upscale:
        source = _without_small(config, source)
    sizes = buckets_of(cropping(config, settings), source.table.widths, source.table.heights)
    return Part(settings, source, sizes)


def _streamed(config: DataConfig, settings: SourceConfig) -> Part:
    from data.streaming import open_stream

    stream = open_stream(
        settings.path,
        caption=settings.caption,
        split=settings.split or "train",
        revision=config.revision,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )
    source = Source(Table.of([]), stream.recognised, stream.notes, [])
    return Part(settings, source, np.empty((0, 2), np.int32), stream)


def policy(config: DataConfig) -> Literal["abort", "report"]:
    """Whether a picture that cannot be used stops the run."""
    return "abort" if config.on_bad_image == "abort" else "report"


def cropping(config: DataConfig, settings: SourceConfig) -> Cropping:
    """How the pictures of one source become pixels."""
    shared = {name: getattr(config, name) for name in Cropping.model_fields}
    return Cropping(**shared | {"resolution": settings.resolution, "crop": settings.crop})


def _without_small(config: DataConfig, source: Source) -> Source:
    small = too_small(source.table.widths, source.table.heights, config.bucket_step)
    if not small.any():
        return source
    reason = f"has a side below data.bucket_step={config.bucket_step}, and data.upscale is off"
    bad = [Rejected(r.id, reason, r.location) for r in source.table.take(np.flatnonzero(small))]
    if config.on_bad_image == "abort" or small.all():
        raise UserError(complaint(source.recognised, bad))
    kept = source.table.take(np.flatnonzero(~small))
    return replace(source, table=kept, rejected=[*source.rejected, *bad])


def index_file(config: DataConfig, settings: SourceConfig) -> Path:
    """Where what was found in a source is remembered."""
    place = settings.path if ":" in settings.path else str(Path(settings.path).resolve())
    what = (place, settings.split, config.revision, config.image_column, config.caption_column)
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    return config.cache / f"index-{name}.arrow"


def cache_bytes(pictures: Pictures, *, config: DataConfig, inpainting: bool = False) -> int:
    """Upper bound of the cache's size: fp16 mean and log-variance of 4 channels at an eighth of
    each side, masks and depth likewise, for inpainting all of it for each random mask too, and SD
    2's 1024 numbers for each token of each caption."""
    cells = int(pictures.sizes.astype(np.int64).prod(axis=1).sum()) // 64
    masked = config.random_masks * 9 if inpainting else 0
    channels = (2 if config.flip else 1) * (8 + masked) + config.masks + config.depth
    random = any(part.settings.crop == "random" for part in pictures.parts)
    latents = cells * channels * 2 * (config.crop_variants if random else 1)
    captions = len(pictures.captions or []) + 1
    windows = pictures.tokens // 75
    return latents + captions * windows * 77 * 1024 * 2 + 1024 * (len(pictures.sizes) + captions)
