"""Random masks for the inpainting model: each picture with parts of it hidden, in the cache.

A mask is 1 where the model is to paint. What stays of the picture goes through the VAE with grey
(0 of [-1, 1]) in place of the rest, as diffusers' StableDiffusionInpaintPipeline does it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import counter
from data.cache import (
    Arriving,
    Encode,
    Job,
    LatentKeys,
    arriving,
    check_finite,
    decoded,
    identity,
    one_behind,
    share,
)
from data.files import Progress, silent
from data.images import Size
from data.maps import DOWN
from data.records import Record

if TYPE_CHECKING:
    import torch

    from data.store import TensorStore

VERSION = 1  # to be raised whenever the same picture would get other masks
WHOLE_EVERY = 4  # masks of a picture, one of which hides all of it
LEAST = 12.0  # pixels of a brush or a side, so that no mask slips between the latents


def tensor_name(number: int, *, flipped: bool) -> str:
    """Under which name the mask `number` is in a picture's entry of the cache, and what it leaves:
    float16 (1 + 2C, h/8, w/8), the mask, then mean and log-variance of the rest's latents."""
    return f"inpainting{VERSION}-{number}{'-flipped' if flipped else ''}"


# Masks


def random_mask(size: Size, sha256: str, number: int) -> np.ndarray:
    """The mask `number` of the picture of this `sha256` at `size`: bool (height, width).

    Every fourth is everything, as Stable Diffusion's own inpainting models were trained; which, is
    drawn per picture. The others are one to three rectangles, or strokes of a broad brush, half of
    them each (Suvorov et al. 2022, LaMa, section 2.3, whose masks SD 2 took).
    """
    first = counter.integer(WHOLE_EVERY, 0, "inpainting", sha256)
    if (first + number) % WHOLE_EVERY == 0:
        return np.ones((size[1], size[0]), dtype=bool)
    random = counter.generator(0, "inpainting", sha256, number)
    image = Image.new("1", size)
    (_rectangles if random.random() < 0.5 else _strokes)(ImageDraw.Draw(image), size, random)
    return np.asarray(image)


def _rectangles(draw: ImageDraw.ImageDraw, size: Size, random: np.random.Generator) -> None:
    """One to three, each side 0.2 to 0.6 of the picture's."""
    for _ in range(random.integers(1, 4)):
        sides = np.maximum(np.array(size) * random.uniform(0.2, 0.6, 2), LEAST)
        corner = np.maximum(np.array(size) - sides, 0) * random.random(2)
        draw.rectangle((*corner, *(corner + sides)), fill=1)


def _strokes(draw: ImageDraw.ImageDraw, size: Size, random: np.random.Generator) -> None:
    """One to four lines of up to six legs that wander and turn, round at every bend."""
    shorter, last = min(size), np.array(size) - DOWN  # the pixel that the last latent looks at
    for _ in range(random.integers(1, 5)):
        width = max(shorter * random.uniform(0.05, 0.2), LEAST)
        place, angle = last * random.random(2), random.uniform(0, 2 * np.pi)
        for _ in range(random.integers(2, 7)):
            angle += random.uniform(-np.pi / 2, np.pi / 2)
            length = shorter * random.uniform(0.1, 0.4)
            step = length * np.array([np.cos(angle), np.sin(angle)])
            end = np.clip(place + step, 0, last)
            draw.line((*place, *end), fill=1, width=round(width))
            for x, y in (place, end):
                draw.circle((x, y), width / 2, fill=1)
            place = end


# Into the cache


class _Work(NamedTuple):
    """Which crops of which pictures lack a mask, one row each."""

    row: array[int]
    variant: array[int]


def cache_masked(
    keys: LatentKeys,
    store: TensorStore,
    encode: Encode,
    *,
    count: int,
    flip: bool = False,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    read: Callable[[Record], bytes] = Record.read,
    progress: Progress = silent,
) -> int:
    """Encodes this process's share of what is missing of `count` masked pictures of each crop;
    returns of how many crops anything was.

    With `flip` those of the mirrored picture and mask too. All is as in `data.cache.cache_latents`,
    in whose entries the tensors are; each picture is read once for all of its masks.
    """
    names = [
        (number, flipped) for number in range(count) for flipped in ([False, True][: 1 + flip])
    ]
    work = _work(keys, store, names, rank, world)
    total = len(work.row)
    if not total:
        return 0
    with store.writer() as writer:
        jobs = _jobs(work, keys, store, names)
        encoding = (
            (job, list(_encoding(parts["pixels"], job, names, encode, batch_size)))
            for (job,), (parts,) in decoded(jobs, keys.background, read)
        )
        for done, (job, batches) in enumerate(one_behind(encoding), 1):
            tensors = _beside_their_masks(batches)
            check_finite(tensors, job.record)
            writer.put(job.key, tensors)
            progress(done, total)
    return total


Names = list[tuple[int, bool]]  # number, and whether flipped


def _work(keys: LatentKeys, store: TensorStore, names: Names, rank: int, world: int) -> _Work:
    identities, rows, variants = array("Q"), array("I"), array("B")
    for index, record in enumerate(keys.records):
        for variant, key in enumerate(keys.keys(index, record)):
            identities.append(identity(key))
            rows.append(index)
            variants.append(variant)
    work = _Work(array("I"), array("B"))
    for at in share(np.frombuffer(identities, np.uint64), rank, world).tolist():
        key = keys.keys(rows[at])[variants[at]]
        if _missing(store, key, names):
            work.row.append(rows[at])
            work.variant.append(variants[at])
    return work


def _missing(store: TensorStore, key: str, names: Names) -> tuple[str, ...]:
    there = store.names(key)
    wanted = (tensor_name(number, flipped=flipped) for number, flipped in names)
    return tuple(name for name in wanted if name not in there)


def _jobs(work: _Work, keys: LatentKeys, store: TensorStore, names: Names) -> Iterator[list[Job]]:
    for index, variant in zip(*work, strict=True):
        record = keys.records[index]
        centre = keys.centres(index, record)[variant]
        key = keys.key(index, record, centre)
        yield [Job(record, keys.size(index), centre, key, _missing(store, key, names))]


Masks = dict[str, "torch.Tensor"]  # by the name of what they hide, float32 (1, H, W)


def _encoding(
    pixels: torch.Tensor, job: Job, names: Names, encode: Encode, batch_size: int
) -> Iterator[tuple[Masks, Arriving]]:
    """What is missing of one crop, in batches: masks, and the moments that they leave; pixels
    (3, H, W)."""
    import torch

    wanted = [
        (name, number, flipped)
        for number, flipped in names
        if (name := tensor_name(number, flipped=flipped)) in job.missing
    ]
    for start in range(0, len(wanted), batch_size):
        some = wanted[start : start + batch_size]
        masks = {name: _mask(job, number, flipped) for name, number, flipped in some}
        hidden = [
            (pixels.flip(-1) if flipped else pixels) * (masks[name] < 0.5)
            for name, _, flipped in some
        ]
        # Always as many at once, as in `data.cache`.
        filled = [hidden[min(row, len(some) - 1)] for row in range(batch_size)]
        yield masks, arriving(encode(torch.stack(filled)))


def _beside_their_masks(batches: list[tuple[Masks, Arriving]]) -> dict[str, torch.Tensor]:
    """What the entry of a crop gets, by name."""
    import torch

    return {
        # The pipeline makes masks small by their nearest pixel too.
        name: torch.cat([mask[:, ::DOWN, ::DOWN].half(), values])
        for masks, wait in batches
        for (name, mask), values in zip(masks.items(), wait(), strict=False)
    }


def _mask(job: Job, number: int, flipped: bool) -> torch.Tensor:
    """float32 (1, H, W)."""
    import torch

    mask = random_mask(job.size, job.record.sha256, number)
    return torch.from_numpy((mask[:, ::-1] if flipped else mask).astype(np.float32))[None]
