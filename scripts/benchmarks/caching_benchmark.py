"""How fast pictures become latents: decoding, encoding, and both at once, as the cache does it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.benchmarks.measuring import seconds, span, spread
from train.config import ROOT

if TYPE_CHECKING:
    import torch

    from data.cache import LatentKeys

TOY_BASE = ROOT / "data/assets/toy-base"
SIDE = 256  # pixels of the pictures that are encoded
AT_ONCE = 4  # of them; as many crops are made of each file


def measure(
    files: Sequence[Path], size: tuple[int, int], *, folder: Path, rounds: int
) -> dict[str, Any]:
    """Files of pictures of `size` to latents of the toy VAE, in turns in each round.

    Decoding has one half of the cores and encoding the other, as if that were a GPU's work: else
    there is nothing to gain by doing both at once.
    """
    import torch

    from data import cache

    cores = len(os.sched_getaffinity(0))
    cache.DECODERS = max(cores // 2, 1)
    torch.set_num_threads(cache.DECODERS)
    keys = _keys(files, size)
    pixels = list(_decoded(keys))
    ways = _ways(keys, pixels, folder)
    for work in ways.values():
        work()  # once to warm up
    taken = [{name: seconds(work) for name, work in ways.items()} for _ in range(rounds)]
    count = sum(len(batch) for batch in pixels)
    shares = [max(round["decode"], round["encode"]) / round["both"] for round in taken]
    return {
        "pictures": count,
        "side": SIDE,
        "rounds": rounds,
        "cores": cores,
        "per_second": {name: spread([count / round[name] for round in taken]) for name in ways},
        "share_of_slower": spread(shares),
        "bf16_ratio": spread([round["encode"] / round["encode_bf16"] for round in taken]),
    }


def _ways(
    keys: LatentKeys, pixels: list[torch.Tensor], folder: Path
) -> dict[str, Callable[[], object]]:
    from diffusers import AutoencoderKL

    from data.cache import cache_latents
    from data.store import TensorStore
    from train.models import latent_encoder

    vae: Any = AutoencoderKL.from_pretrained(TOY_BASE, subfolder="vae")
    vae = vae.float().eval().requires_grad_(False)
    fp32, bf16 = latent_encoder(vae), latent_encoder(vae, "bf16")
    stores = (TensorStore(folder / f"cache-{number}") for number in range(10**6))
    return {
        "decode": lambda: list(_decoded(keys)),
        "encode": lambda: [fp32(batch) for batch in pixels],
        "both": lambda: cache_latents(keys, next(stores), fp32, batch_size=AT_ONCE),
        "encode_bf16": lambda: [bf16(batch) for batch in pixels],
    }


def _keys(files: Sequence[Path], size: tuple[int, int]) -> LatentKeys:
    from data.cache import LatentKeys
    from data.records import Record

    records = [
        Record(file.name, f"file:{file}", ("",), *size, _sha256(file.read_bytes()))
        for file in files
    ]
    sizes = np.full((len(files), 2), SIDE, np.int32)
    return LatentKeys(records, sizes, "vae", crops=["random"], crop_variants=AT_ONCE)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _decoded(keys: LatentKeys) -> Iterator[torch.Tensor]:
    """The pixels (B, 3, H, W) of each picture's crops."""
    import torch

    from data.cache import MOMENTS, Job, decoded
    from data.images import WHITE
    from data.records import Record

    batches = (
        [
            Job(record, keys.size(index), centre, "", (MOMENTS,))
            for centre in keys.centres(index, record)
        ]
        for index, record in enumerate(keys.records)
    )
    for _, ready in decoded(batches, WHITE, Record.read):
        yield torch.stack([parts["pixels"] for parts in ready])


def rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The results as rows of a table."""
    rates, side = result["per_second"], result["side"]
    yield f"12-megapixel JPEGs to {side}x{side}, per second", span(rates["decode"], 1), ""
    what = f"latents of {side}x{side} encoded by the toy VAE, per second"
    yield f"{what}, fp32, half of {result['cores']} cores", span(rates["encode"], 1), ""
    yield f"{what}, bf16", span(rates["encode_bf16"], 1), ""
    yield "bf16 times faster", span(result["bf16_ratio"]), ""
    yield "JPEGs decoded, encoded (fp32) and written, per second", span(rates["both"], 1), ""
    yield "share of the slower one's rate", span(result["share_of_slower"]), ""
