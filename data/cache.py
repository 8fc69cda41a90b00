"""Latents and caption embeddings in a store, each under a key of everything that it depends on.

An edited picture, another VAE, size or crop has another key, so nothing stale is ever read and only
what is missing is encoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from data import images, maps
from data.files import Progress, silent
from data.images import WHITE, Colour, Size
from data.records import Record
from train.config import UserError

if TYPE_CHECKING:
    import torch

    from data.store import TensorStore, Writer

VERSION = 3  # to be raised whenever the same picture or caption would be encoded differently
MOMENTS, FLIPPED, MASK, DEPTH = NAMES = ("moments", "moments_flipped", "mask", "depth")
EMBEDDINGS = "embeddings"
DECODERS = min(8, os.cpu_count() or 1)

Centre = tuple[float, float]
Encode = Callable[["torch.Tensor"], "torch.Tensor"]
EncodeText = Callable[[list[str]], "Sequence[torch.Tensor]"]
Arriving = Callable[[], "torch.Tensor"]
T = TypeVar("T")


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([VERSION, *parts]).encode(), digest_size=20).hexdigest()


def latent_key(
    record: Record,
    vae_fingerprint: str,
    size: Size,
    centre: Centre = (0.5, 0.5),
    *,
    background: Colour = WHITE,
) -> str:
    """The key of one picture's latents, and of its mask and depth, at one size and crop."""
    box = images.fit_geometry(record.width, record.height, size, centre).box
    kept = [round(side, 3) + 0.0 for side in box]  # and no -0.0
    beside = [record.mask_sha256, record.depth_sha256]
    return _key("latent", record.sha256, vae_fingerprint, size, kept, background, beside)


def text_key(caption: str, text_encoder_fingerprint: str, tokenizer_fingerprint: str) -> str:
    """The key of one caption's embeddings; the fingerprints cover the length and layer used."""
    return _key("text", caption, text_encoder_fingerprint, tokenizer_fingerprint)


@dataclass(frozen=True, eq=False)
class LatentKeys:
    """Which entries each picture has, worked out when asked: nothing is kept per picture."""

    records: Sequence[Record]
    sizes: np.ndarray
    """The bucket of each record, (n, 2): width and height in pixels."""
    vae_fingerprint: str
    crops: Sequence[Any] = ("centre",)
    """How the pictures of each source are cropped: centre, random or focus."""
    sources: np.ndarray | None = None
    """Which source each record is from, (n,); None where there is one."""
    crop_variants: int = 4
    """Crops of a picture that is cropped at random."""
    background: Colour = WHITE

    def __post_init__(self) -> None:
        assert len(self.records) == len(self.sizes)
        assert self.sources is not None or len(self.crops) == 1

    def size(self, index: int) -> Size:
        return int(self.sizes[index, 0]), int(self.sizes[index, 1])

    def keys(self, index: int, record: Record | None = None) -> list[str]:
        """The key of each crop of a picture: one, or `crop_variants` where crops are random."""
        record = record or self.records[index]
        return [self.key(index, record, centre) for centre in self.centres(index, record)]

    def key(self, index: int, record: Record, centre: Centre) -> str:
        return latent_key(
            record, self.vae_fingerprint, self.size(index), centre, background=self.background
        )

    def centres(self, index: int, record: Record) -> list[Centre]:
        """The point that each crop of a picture is taken about."""
        return images.crop_centres(
            record.width,
            record.height,
            self.size(index),
            crop=self.crops[0 if self.sources is None else int(self.sources[index])],
            focus=record.focus,
            sha256=record.sha256,
            variants=self.crop_variants,
        )


class _Work(NamedTuple):
    """What is to be encoded, one row per entry: small numbers only, there may be millions."""

    row: np.ndarray  # of the record
    variant: np.ndarray  # which of its crops
    missing: np.ndarray  # which of NAMES its entry lacks, as bits


class Job(NamedTuple):
    """One crop of one picture, to be encoded."""

    record: Record
    size: Size
    centre: Centre
    key: str
    missing: tuple[str, ...]


def cache_latents(
    keys: LatentKeys,
    store: TensorStore,
    encode: Encode,
    *,
    flip: bool = False,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    read: Callable[[Record], bytes] = Record.read,
    progress: Progress = silent,
) -> int:
    """Encodes this process's share of what is missing; returns the number of entries encoded.

    `encode` maps pixels (B, 3, H, W), float32 in [-1, 1], to the VAE's moments (B, 2C, H/8, W/8),
    with B = batch_size always, the last picture repeated where there are fewer:
    mean and log-variance along the channels. They are kept in float16 as "moments", and with
    `flip` those of the mirrored picture as "moments_flipped"; a mask and a depth map beside the
    picture become "mask" and "depth" (1, H/8, W/8), see `data.maps`. The next pictures are decoded
    while these are encoded, and a batch is written once the next is on its way to the device. The
    caller waits for the other processes, then calls `store.refresh`.

    `read` gives a picture's bytes. `progress(done, total)` is called after each batch, counts this
    process's entries, and may raise to stop: what is done stays done. Raises UserError naming a
    picture that changed since it was scanned or whose moments are not finite.
    """
    work = _work(keys, store, flip, rank, world)
    done, total = 0, len(work.row)
    if not total:
        return 0  # a complete cache may be read-only
    with store.writer() as writer:
        batches = decoded(_batches(work, keys, batch_size), keys.background, read)
        encoding = ((batch, _encode_batch(*batch, encode, batch_size)) for batch in batches)
        for (jobs, ready), moments in one_behind(encoding):
            _write_batch(jobs, ready, moments, writer)
            done += len(jobs)
            progress(done, total)
    return total


def _work(keys: LatentKeys, store: TensorStore, flip: bool, rank: int, world: int) -> _Work:
    """This process's share, sorted so that what can share a batch is together."""
    identities, rows, variants, bits = array("Q"), array("I"), array("B"), array("B")
    for index, record in enumerate(keys.records):
        wanted = (True, flip, record.mask is not None, record.depth is not None)
        for variant, key in enumerate(keys.keys(index, record)):
            there = store.names(key)
            lacking = (want and name not in there for want, name in zip(wanted, NAMES, strict=True))
            identities.append(identity(key))
            rows.append(index)
            variants.append(variant)
            bits.append(sum(lacks << bit for bit, lacks in enumerate(lacking)))
    columns = (np.frombuffer(column, column.typecode) for column in (rows, variants, bits))
    mine = share(np.frombuffer(identities, np.uint64), rank, world)
    work = _Work(*(column[mine] for column in columns))
    work = _Work(*(column[work.missing > 0] for column in work))
    widths, heights = keys.sizes[work.row].T
    return _Work(*(column[np.lexsort((work.missing, heights, widths))] for column in work))


def identity(text: str) -> int:
    """A number for it that is as good as its own, 64 bits."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"))


def share(identities: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The positions of this process's share of different values, in order.

    It does not depend on what is missing: the disk may be changing under another process's hands.
    """
    first = np.unique(identities, return_index=True)[1]
    first.sort()
    return first[rank::world]


def _batches(work: _Work, keys: LatentKeys, batch_size: int) -> Iterator[list[Job]]:
    alike = np.column_stack([keys.sizes[work.row], work.missing])
    borders = np.flatnonzero((alike[1:] != alike[:-1]).any(axis=1)) + 1
    for group in np.split(np.arange(len(alike)), borders):
        for start in range(0, len(group), batch_size):
            yield [_job(work, keys, at) for at in group[start : start + batch_size]]


def _job(work: _Work, keys: LatentKeys, at: int) -> Job:
    index, bits = int(work.row[at]), int(work.missing[at])
    record = keys.records[index]
    centre = keys.centres(index, record)[work.variant[at]]
    missing = tuple(name for bit, name in enumerate(NAMES) if bits >> bit & 1)
    return Job(record, keys.size(index), centre, keys.key(index, record, centre), missing)


Ready = dict[str, "torch.Tensor"]  # "pixels" (3, H, W) where they are to be encoded, mask, depth


def decoded(
    batches: Iterable[list[Job]], background: Colour, read: Callable[[Record], bytes]
) -> Iterator[tuple[list[Job], list[Ready]]]:
    """Each batch with what was read for it, later ones decoding meanwhile."""
    pending: deque[tuple[list[Job], list[Future[Ready]]]] = deque()
    pool = ThreadPoolExecutor(DECODERS)
    try:
        for jobs in batches:
            pending.append((jobs, [pool.submit(_ready, job, background, read) for job in jobs]))
            if sum(len(waiting) for waiting, _ in pending) >= DECODERS + len(pending[0][0]):
                first, futures = pending.popleft()
                yield first, [future.result() for future in futures]
        while pending:
            first, futures = pending.popleft()
            yield first, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _ready(job: Job, background: Colour, read: Callable[[Record], bytes]) -> Ready:
    record, ready = job.record, {}
    if set(job.missing) - {MASK, DEPTH}:
        content = _unchanged(read(record), record.sha256, record.path or record.id)
        image = images.open_image(io.BytesIO(content), background, cover=job.size)
        ready["pixels"] = images.to_tensor(images.fit(image, job.size, job.centre))
    fitted = images.fit_geometry(record.width, record.height, job.size, job.centre)
    box = maps.relative(fitted.box, record.width, record.height)
    if MASK in job.missing:
        content = _beside(record.mask, record.mask_sha256)
        ready[MASK] = maps.mask_latent(content, job.size, box)
    if DEPTH in job.missing:
        content = _beside(record.depth, record.depth_sha256)
        ready[DEPTH] = maps.depth_latent(content, job.size, box)
    return ready


def _beside(path: str | None, sha256: str | None) -> bytes:
    assert path and sha256
    try:
        return _unchanged(Path(path).read_bytes(), sha256, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _unchanged(content: bytes, sha256: str, what: object) -> bytes:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{what} changed while it was being read: run the command again")
    return content


def _encode_batch(
    jobs: list[Job], ready: list[Ready], encode: Encode, batch_size: int
) -> dict[str, Arriving]:
    """The moments of a batch by name, (batch_size, 2C, H/8, W/8)."""
    import torch

    if "pixels" not in ready[0]:
        return {}
    pixels = torch.stack([parts.pop("pixels") for parts in ready])
    # Always as many at once: a sum's rounding may depend on the size of the batch, and the
    # latents of a picture should not depend on which others were missing.
    filled = [min(row, len(jobs) - 1) for row in range(batch_size)]
    pixels = pixels[filled]
    return {
        name: arriving(encode(pixels.flip(-1) if name == FLIPPED else pixels))
        for name in jobs[0].missing
        if name in {MOMENTS, FLIPPED}
    }


def arriving(moments: torch.Tensor) -> Arriving:
    """Sends what is encoded, or still being encoded, to the CPU as float16; what it returns waits
    for it."""
    import torch

    half = moments.detach().half()
    if half.device.type != "cuda":
        return half.cpu
    sent = half.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return sent

    return wait


def one_behind(started: Iterable[T]) -> Iterator[T]:
    """The same, each once the next has been started; before an error, what had been started."""
    waiting: list[T] = []
    try:
        for one in started:
            waiting.append(one)
            if len(waiting) > 1:
                yield waiting.pop(0)
    except Exception:
        yield from waiting
        raise
    yield from waiting


def _write_batch(
    jobs: list[Job], ready: list[Ready], moments: dict[str, Arriving], writer: Writer
) -> None:
    arrived = {name: wait() for name, wait in moments.items()}
    for row, (job, beside) in enumerate(zip(jobs, ready, strict=True)):
        latents = {name: values[row] for name, values in arrived.items()}
        check_finite(latents, job.record)
        writer.put(job.key, latents | beside)


def check_finite(latents: dict[str, torch.Tensor], record: Record) -> None:
    """Raises UserError naming the picture whose latents are not finite."""
    if not all(bool(tensor.isfinite().all()) for tensor in latents.values()):
        raise UserError(
            f"{record.path or record.id}: its latents are not finite; encode with the VAE in "
            "float32, and if that does not help, remove the picture"
        )


def cache_captions(
    captions: Sequence[str],
    store: TensorStore,
    encode_text: EncodeText,
    *,
    text_encoder_fingerprint: str,
    tokenizer_fingerprint: str,
    batch_size: int = 64,
    rank: int = 0,
    world: int = 1,
    progress: Progress = silent,
) -> int:
    """Encodes this process's share of the missing captions, "" among them; returns how many.

    `encode_text` maps captions to the embeddings (L, D) of each, kept in float16 as "embeddings".
    `progress` is as in `cache_latents`. Raises UserError naming a caption whose embeddings are not
    finite.
    """

    def caption(position: int) -> str:
        return captions[position - 1] if position else ""  # which caption dropout needs

    def key(position: int) -> str:
        return text_key(caption(position), text_encoder_fingerprint, tokenizer_fingerprint)

    identities = (identity(text) for text in chain([""], captions))
    mine = share(np.fromiter(identities, np.uint64), rank, world).tolist()
    missing = [position for position in mine if EMBEDDINGS not in store.names(key(position))]
    if not missing:
        return 0
    with store.writer() as writer:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            encoded = encode_text([caption(position) for position in batch])
            for position, embeddings in zip(batch, encoded, strict=True):
                half = embeddings.detach().cpu().half()
                if not half.isfinite().all():
                    raise UserError(
                        f"the embeddings of the caption {caption(position)!r} are not finite: "
                        "encode with the text encoder in float32"
                    )
                writer.put(key(position), {EMBEDDINGS: half})
            progress(start + len(batch), len(missing))
    return len(missing)
