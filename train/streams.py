"""Datasets that are streamed: their pictures pass once, and leave latents and a table behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.buckets import buckets_of, too_small
from data.files import progress, silent
from data.records import Record, Table
from train.config import DataConfig
from train.node_caches import Share
from train.pictures import Part, Pictures, bucketed, cropping, policy
from train.stopping import checking, jointly

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.cache import LatentKeys
    from data.store import TensorStore
    from train.method import Pipeline

# Held in memory as files. Many, because each bucket's last batch is filled up to a whole one.
PICTURES_AT_ONCE, BYTES_AT_ONCE = 256, 512 << 20


def stream_in(
    pictures: Pictures,
    store: TensorStore,
    pipeline: Pipeline,
    data: DataConfig,
    accelerator: Accelerator,
    share: Share,
) -> Pictures:
    """The pictures with every streamed source passed through the VAE, unless it was before.

    Each process takes its share of the shards, and all meet here. What a killed pass had finished
    is kept, and a shard is streamed again where the cache has lost any of it.
    """
    parts = []
    for part in pictures.parts:
        if part.stream is not None:
            passing = _Passing.of(part, store, pipeline, data)
            part = bucketed(data, part.settings, passing.run(accelerator, share))
        parts.append(part)
    return Pictures(parts)


@dataclass(frozen=True)
class _Passing:
    """One streamed source on its way into the cache."""

    part: Part
    store: TensorStore
    encode: Callable[..., Any]
    vae: str
    data: DataConfig

    @classmethod
    def of(cls, part: Part, store: TensorStore, pipeline: Pipeline, data: DataConfig) -> _Passing:
        from train.models import latent_encoder, latent_fingerprint

        encode = latent_encoder(pipeline.vae, data.cache_precision)
        vae = latent_fingerprint(pipeline.vae, data.cache_precision)
        return cls(part, store, encode, vae, data)

    @property
    def folder(self) -> Path:
        """Where its tables are; another for whatever makes other latents of it."""
        sizes, data = cropping(self.data, self.part.settings), self.data
        made = (self.vae, sizes.model_dump_json(), self._crop, data.background, data.flip)
        assert self.part.stream is not None
        name = hashlib.sha256(repr((self.part.stream.fingerprint, made)).encode()).hexdigest()
        return data.cache / f"stream-{name[:16]}"

    @property
    def _crop(self) -> str:
        return self.part.settings.crop or self.data.crop

    def run(self, accelerator: Accelerator, share: Share) -> Any:
        """Streams what is not finished; the source, once every process is through."""
        from data.streaming import collect, stream_records

        assert self.part.stream is not None
        on_bad = policy(self.data)
        if accelerator.is_main_process:
            for note in self.part.stream.idle(share.world):
                print(f"note     {note}", flush=True)
        if share.rank == 0:
            self._forget_what_is_lost()
        accelerator.wait_for_everyone()
        mine = partial(
            stream_records,
            self.part.stream,
            self.folder,
            self._visit,
            on_bad=on_bad,
            **share._asdict(),
            progress=checking(progress("streaming shards", accelerator.is_main_process)),
        )
        jointly(accelerator, mine)
        self.store.refresh()
        return collect(self.part.stream, self.folder, on_bad=on_bad)

    def _forget_what_is_lost(self) -> None:
        from data.streaming import done_units, unit_file

        assert self.part.stream is not None
        for unit in done_units(self.part.stream, self.folder):
            file = unit_file(self.folder, unit)
            if not self._cached(Table.open(file)):
                file.unlink()

    def _cached(self, table: Table) -> bool:
        from data.cache import FLIPPED, MOMENTS

        wanted = {MOMENTS, FLIPPED} if self.data.flip else {MOMENTS}
        table = self._large_enough(table)
        keys = self._keys(table)
        return all(
            wanted <= self.store.names(key)
            for index, record in enumerate(table)
            for key in keys.keys(index, record)
        )

    def _visit(self, pictures: Iterator[tuple[Record, bytes]]) -> None:
        from data.cache import cache_latents

        while chunk := _chunk(pictures):
            table = self._large_enough(Table.of(record for record, _ in chunk))
            cache_latents(
                self._keys(table),
                self.store,
                self.encode,
                flip=self.data.flip,
                batch_size=self.data.cache_batch_size,
                read=_reader({record.id: file for record, file in chunk}),
                progress=checking(silent),
            )

    def _large_enough(self, table: Table) -> Table:
        """Without what `bucketed` will leave out, or complain of, once all is known."""
        if self.data.upscale:
            return table
        small = too_small(table.widths, table.heights, self.data.bucket_step)
        return table.take((~small).nonzero()[0])

    def _keys(self, table: Table) -> LatentKeys:
        from data.cache import LatentKeys

        sizes = buckets_of(cropping(self.data, self.part.settings), table.widths, table.heights)
        return LatentKeys(
            table,
            sizes,
            self.vae,
            crops=[self._crop],
            crop_variants=self.data.crop_variants,
            background=self.data.background,
        )


def _chunk(pictures: Iterator[tuple[Record, bytes]]) -> list[tuple[Record, bytes]]:
    chunk, size = [], 0
    for picture in islice(pictures, PICTURES_AT_ONCE):
        chunk.append(picture)
        size += len(picture[1])
        if size >= BYTES_AT_ONCE:
            break
    return chunk


def _reader(content: dict[str, bytes]) -> Callable[[Record], bytes]:
    return lambda record: content[record.id]
