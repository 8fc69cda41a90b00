"""Latents and caption embeddings on disk, each under a key of everything that it depends on.

An edited picture, another VAE or another size has another key, so nothing stale is ever read and
only what is missing is encoded. Entries are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data import images
from data.images import WHITE, Colour, Size
from train.config import UserError

if TYPE_CHECKING:
    import torch

    from data.sources import Record

VERSION = 1  # to be raised whenever the same picture or caption would be encoded differently
MOMENTS, FLIPPED, EMBEDDINGS = "moments", "moments_flipped", "embeddings"
DECODERS = min(8, os.cpu_count() or 1)

Tensors = dict[str, "torch.Tensor"]
Encode = Callable[["torch.Tensor"], "torch.Tensor"]
EncodeText = Callable[[list[str]], "torch.Tensor"]
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """The progress that nobody watches."""


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it, also through a crash: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class TensorCache:
    """Named tensors under hexadecimal keys: safetensors files in `folder`, with a checksum each."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:4] / f"{key}.safetensors"

    def names(self, key: str) -> frozenset[str]:
        """What the entry holds, from its header alone; nothing if absent or cut short."""
        try:
            with self.path(key).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = os.fstat(file.fileno()).st_size
                header = json.loads(file.read(length)) if length < size else {}
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return frozenset()
        return frozenset(header) if size == 8 + length + end else frozenset()

    def get(self, key: str) -> Tensors | None:
        """The tensors on the CPU; None where there are none. A damaged entry is removed."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        tensors = _unpack(content, key)
        if tensors is None:
            self._remove(key)
        return tensors

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes the entry, replacing what was there. Raises UserError where it cannot."""
        from safetensors.torch import save

        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(ready, metadata={"checksum": _checksum(key, ready)})
        try:
            write_atomically(self.path(key), content)
        except OSError as error:
            raise UserError(
                f"cannot write the cache in {self.folder}: {error.strerror or error}; "
                "free some space there or choose another folder"
            ) from error

    def _remove(self, key: str) -> None:
        try:
            self.path(key).unlink(missing_ok=True)
        except OSError:
            pass  # a read-only cache: the entry stays a miss


def _unpack(content: bytes, key: str) -> Tensors | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError):
        return None
    return tensors if metadata.get("checksum") == _checksum(key, tensors) else None


def _checksum(key: str, tensors: Tensors) -> str:
    import torch

    total = hashlib.blake2b(key.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps([VERSION, *parts]).encode(), digest_size=20).hexdigest()


def latent_key(
    sha256: str,
    vae_fingerprint: str,
    size: Size,
    crop: str = "centre",
    *,
    background: Colour = WHITE,
) -> str:
    """The key of one picture's latent moments: `sha256` is of the file's bytes."""
    return _key("latent", sha256, vae_fingerprint, list(size), crop, list(background))


def text_key(caption: str, text_encoder_fingerprint: str, tokenizer_fingerprint: str) -> str:
    """The key of one caption's embeddings; the fingerprints cover the length and layer used."""
    return _key("text", caption, text_encoder_fingerprint, tokenizer_fingerprint)


def latent_keys(
    records: Sequence[Record],
    sizes: Sequence[Size],
    vae_fingerprint: str,
    *,
    background: Colour = WHITE,
) -> list[str]:
    """`latent_key` of each record at its size."""
    return [
        latent_key(record.sha256, vae_fingerprint, size, background=background)
        for record, size in zip(records, sizes, strict=True)
    ]


def text_keys(
    captions: Iterable[str], text_encoder_fingerprint: str, tokenizer_fingerprint: str
) -> dict[str, str]:
    """Each different caption's `text_key`; always with "", which caption dropout needs."""
    return {
        caption: text_key(caption, text_encoder_fingerprint, tokenizer_fingerprint)
        for caption in dict.fromkeys(["", *captions])
    }


class _Job(NamedTuple):
    """One picture to encode: `missing` are the names its entry still lacks."""

    size: Size
    missing: tuple[str, ...]
    key: str
    record: Record


def cache_latents(
    records: Sequence[Record],
    sizes: Sequence[Size],
    cache: TensorCache,
    encode: Encode,
    *,
    vae_fingerprint: str,
    flip: bool = False,
    background: Colour = WHITE,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    progress: Progress = silent,
) -> int:
    """Encodes this process's share of what is missing; returns the number of pictures encoded.

    `encode` maps pixels (B, 3, H, W), float32 in [-1, 1], to the VAE's moments (B, 2C, H/8, W/8):
    mean and log-variance along the channels. They are kept in float16 as "moments", and with
    `flip` those of the mirrored picture as "moments_flipped". The next batch is decoded while this
    one is encoded. The caller waits for the other processes.

    `progress(done, total)` is called after each batch, counts this process's pictures, and may
    raise to stop: what is done stays done. Raises UserError naming a picture that changed since it
    was scanned or whose moments are not finite.
    """
    keys = latent_keys(records, sizes, vae_fingerprint, background=background)
    wanted = (MOMENTS, FLIPPED) if flip else (MOMENTS,)
    jobs = _jobs(records, sizes, keys, cache, wanted, rank, world)
    done = 0
    for batch, pixels in _decoded(_batches(jobs, batch_size), background):
        _encode_batch(batch, pixels, cache, encode)
        done += len(batch)
        progress(done, len(jobs))
    return len(jobs)


def _jobs(
    records: Sequence[Record],
    sizes: Sequence[Size],
    keys: Sequence[str],
    cache: TensorCache,
    wanted: tuple[str, ...],
    rank: int,
    world: int,
) -> list[_Job]:
    # Copies of one picture share a key. The split comes before the look at the disk, which another
    # process may be changing.
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    jobs = []
    for index in sorted(first.values())[rank::world]:
        there = cache.names(keys[index])
        missing = tuple(name for name in wanted if name not in there)
        if missing:
            jobs.append(_Job(sizes[index], missing, keys[index], records[index]))
    return jobs


def _batches(jobs: list[_Job], batch_size: int) -> Iterator[list[_Job]]:
    for _, same in groupby(sorted(jobs, key=lambda job: job[:2]), key=lambda job: job[:2]):
        group = list(same)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _decoded(
    batches: Iterable[list[_Job]], background: Colour
) -> Iterator[tuple[list[_Job], torch.Tensor]]:
    """Each batch with its pixels, the next one decoding meanwhile."""
    import torch

    pending: deque[tuple[list[_Job], list[Future[torch.Tensor]]]] = deque()
    with ThreadPoolExecutor(DECODERS) as pool:
        for batch in batches:
            pending.append((batch, [pool.submit(_pixels, job, background) for job in batch]))
            if len(pending) > 1:
                ready, futures = pending.popleft()
                yield ready, torch.stack([future.result() for future in futures])
        for ready, futures in pending:
            yield ready, torch.stack([future.result() for future in futures])


def _pixels(job: _Job, background: Colour) -> torch.Tensor:
    record = job.record
    try:
        content = record.path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {record.path}: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise UserError(f"{record.path} changed while it was being read: run the command again")
    image = images.open_image(io.BytesIO(content), background, cover=job.size)
    return images.to_tensor(images.fit(image, job.size))


def _encode_batch(
    batch: list[_Job], pixels: torch.Tensor, cache: TensorCache, encode: Encode
) -> None:
    moments = {
        name: encode(pixels.flip(-1) if name == FLIPPED else pixels).detach().cpu().half()
        for name in batch[0].missing
    }
    for row, job in enumerate(batch):
        new = {name: values[row].clone() for name, values in moments.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in new.values()):
            raise UserError(
                f"{job.record.path}: its latents are not finite; encode with the VAE in float32, "
                "and if that does not help, remove the picture"
            )
        cache.put(job.key, (cache.get(job.key) or {}) | new)


def cache_captions(
    captions: Iterable[str],
    cache: TensorCache,
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

    `encode_text` maps B captions to (B, L, D) with the same L always; kept in float16 as
    "embeddings". `progress` is as in `cache_latents`. Raises UserError naming a caption whose
    embeddings are not finite.
    """
    keys = text_keys(captions, text_encoder_fingerprint, tokenizer_fingerprint)
    mine = sorted(keys)[rank::world]
    missing = [caption for caption in mine if EMBEDDINGS not in cache.names(keys[caption])]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        embeddings = encode_text(batch).detach().cpu().half()
        for caption, embedding in zip(batch, embeddings, strict=True):
            if not embedding.isfinite().all():
                raise UserError(
                    f"the embeddings of the caption {caption!r} are not finite: encode with the "
                    "text encoder in float32"
                )
            cache.put(keys[caption], {EMBEDDINGS: embedding.clone()})
        progress(start + len(batch), len(missing))
    return len(missing)
