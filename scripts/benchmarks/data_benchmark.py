"""The speed and memory of everything between a folder of pictures and a batch."""

from __future__ import annotations

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scripts.benchmarks import caching_benchmark
from scripts.benchmarks.measuring import fresh, in_turns, seconds, span, spread
from scripts.benchmarks.photographs import photograph

HERE = __name__
PHOTO = (4000, 3000)  # 12 megapixels
LATENT = (8, 96, 96)  # moments of a picture of 768 x 768
SIDES = (32, 65)  # pixels of the tiny pictures, at least and less than

Results = dict[str, dict[str, Any]]


class Scale(NamedTuple):
    """How much of everything."""

    photos: int
    rounds: int
    rows: int
    entries: int
    builds: tuple[int, ...]
    edited: int


FULL = Scale(8, 7, 1_000_000, 4000, (1_000, 10_000, 100_000), 1000)
QUICK = Scale(2, 3, 100_000, 200, (1_000, 10_000), 100)


def measure(parts: Sequence[str], scale: Scale, *, scratch: Path | None = None) -> Results:
    """The results of each part by its name."""
    known: dict[str, Callable[[Path, Scale], dict[str, Any]]] = {
        "decode": decode,
        "planning": planning,
        "reading": reading,
        "memory": memory,
        "edit": edit,
        "caching": caching,
    }
    results = {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
            results[part] = known[part](Path(folder), scale)
    return results


def table(results: Results) -> str:
    """The results as Markdown."""
    rows = [("what", "measured", "target"), ("---", "---", "---")]
    rows += [row for part, result in results.items() for row in ROWS[part](result)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Decoding


def decode(folder: Path, scale: Scale) -> dict[str, Any]:
    """12-megapixel JPEGs to the pixels of their buckets, against the plain way to do that."""
    from data.buckets import assign, make_buckets

    photos = [_photo(number, rotated=number % 4 == 3) for number in range(scale.photos)]
    size = assign(*PHOTO, make_buckets(768))
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        ours = partial(_all, pool, photos, partial(_our_route, size=size))
        plain = partial(_all, pool, photos, partial(_plain_route, size=size))
        ours()  # once to warm up
        timed = in_turns(ours, plain, scale.rounds)
    return {
        "pictures": scale.photos,
        "rounds": scale.rounds,
        "threads": threads,
        "bucket": list(size),
        "file_mib": round(statistics.mean(map(len, photos)) / 2**20, 2),
        "seconds": timed["first"],
        "plain_seconds": timed["second"],
        "ratio": timed["ratio"],
    }


def _all(pool: ThreadPoolExecutor, photos: list[bytes], route: Callable[[bytes], object]) -> None:
    list(pool.map(route, photos))


def _our_route(content: bytes, *, size: tuple[int, int]) -> np.ndarray:
    from data import images

    return images.fit(images.open_image(io.BytesIO(content), cover=size), size)


def _plain_route(content: bytes, *, size: tuple[int, int]) -> np.ndarray:
    """Open, convert, resize, crop; without a look at the orientation, which we have to do."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if picture.width < picture.height:
        size = (size[1], size[0])
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = round(picture.width * scale), round(picture.height * scale)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return np.asarray(resized.crop((left, top, left + size[0], top + size[1])))


def _photo(number: int, *, rotated: bool) -> bytes:
    return photograph(number, (PHOTO[1], PHOTO[0]) if rotated else PHOTO, rotated=rotated)


# Planning


def planning(folder: Path, scale: Scale) -> dict[str, Any]:
    """From a table on disk to the first and the last batch of an epoch."""
    path = folder / "table.arrow"
    fresh(f"{HERE}:write_table", path=str(path), rows=scale.rows)
    runs = [fresh(f"{HERE}:plan", path=str(path)) for _ in range(3)]
    return {
        "rows": scale.rows,
        "seconds": spread([run["seconds"] for run in runs]),
        "peak_mib": max(run["peak_mib"] for run in runs),
        "buckets": runs[0]["buckets"],
        "batches": runs[0]["batches"],
    }


def write_table(path: str, rows: int) -> dict[str, Any]:
    from data.records import Record, Table

    sides = np.random.default_rng(0).integers(200, 6000, (rows, 2)).tolist()
    records = (
        Record(
            id=f"{row // 1000:04}/{row:07}.jpg",
            location=f"file:/pictures/{row // 1000:04}/{row:07}.jpg",
            captions=("a photo of a red boat on a lake in the morning",),
            width=width,
            height=height,
            sha256=f"{row:064x}",
        )
        for row, (width, height) in enumerate(sides)
    )
    Table.write(Path(path), records)
    return {}


def plan(path: str) -> dict[str, Any]:
    start = time.perf_counter()
    from data.buckets import account, plan_buckets
    from data.order import Order
    from data.records import Table

    rows = Table.open(Path(path))
    sizes = plan_buckets(rows.widths, rows.heights, resolutions=[768], step=64)
    cropped = account(rows.widths, rows.heights, sizes).cropped
    order = Order(sizes, seed=0, batch_size=8)
    for step in (0, order.batches_in(0) - 1):
        indices, _ = order.batch(step)
        assert len(indices) and 0 <= cropped[indices].min() <= 1
    return {
        "seconds": time.perf_counter() - start,
        "buckets": len(np.unique(sizes, axis=0)),
        "batches": order.batches_in(0),
    }


# Reading


def reading(folder: Path, scale: Scale) -> dict[str, Any]:
    """Latents of pictures at 768 x 768 from the cache, and whole samples."""
    there: dict[str, Any] = {"folder": str(folder), "entries": scale.entries}
    fresh(f"{HERE}:write_latents", **there)
    return fresh(f"{HERE}:read_latents", **there, rounds=scale.rounds)


def _records(entries: int) -> Any:
    from data.records import Record, Table

    return Table.of(
        Record(f"{number}.png", f"file:/{number}.png", ("a boat",), 768, 768, f"{number:064x}")
        for number in range(entries)
    )


def _latent_keys(entries: int) -> Any:
    from data.cache import LatentKeys

    return LatentKeys(_records(entries), np.full((entries, 2), 768, np.int32), "vae")


def write_latents(folder: str, entries: int) -> dict[str, Any]:
    import torch

    from data.cache import EMBEDDINGS, MOMENTS, text_key
    from data.store import TensorStore

    keys = _latent_keys(entries)
    with TensorStore(folder).writer() as writer:
        for number in range(entries):
            writer.put(keys.keys(number)[0], {MOMENTS: torch.randn(LATENT).half()})
        writer.put(text_key("a boat", "t", "k"), {EMBEDDINGS: torch.randn(77, 1024).half()})
    return {}


def read_latents(folder: str, entries: int, rounds: int) -> dict[str, Any]:
    import torch

    from data.cache import text_key
    from data.loader import TrainingSet
    from data.noising import Noising
    from data.order import Order
    from data.store import TensorStore
    from data.wording import Wording
    from train.config import DiffusionConfig

    torch.set_num_threads(1)  # as in a worker of the loader
    keys, store = _latent_keys(entries), TensorStore(folder)
    training_set = TrainingSet(
        records=keys.records,
        order=Order(keys.sizes, seed=0, batch_size=8),
        wordings=[Wording()],
        store=store,
        latent_keys=keys,
        seed=0,
        scaling_factor=0.18215,
        noising=Noising.of(DiffusionConfig(), 1000),
        embedding_key=lambda caption: text_key(caption, "t", "k"),
    )
    names = [keys.keys(number)[0] for number in range(entries)]

    def get(order: np.ndarray) -> None:
        for number in order:
            assert store.get(names[number])

    def sample(order: np.ndarray) -> None:
        for number in order[: max(len(order) // 8, 1)]:
            training_set.sample(0, int(number))

    orders = [np.random.default_rng(round).permutation(entries) for round in range(rounds + 1)]
    get(orders[0])  # from here on the files are in memory
    few = max(entries // 8, 1)
    return {
        "entries": entries,
        "bytes": int(np.prod(LATENT)) * 2,
        "rounds": rounds,
        "gets_per_second": spread([entries / seconds(partial(get, order)) for order in orders[1:]]),
        "samples_per_second": spread(
            [few / seconds(partial(sample, order)) for order in orders[1:]]
        ),
    }


# Building


def memory(folder: Path, scale: Scale) -> dict[str, Any]:
    """Scan, buckets and latents of folders of tiny pictures, each in a fresh process."""
    runs = []
    for count in scale.builds:
        pictures, cache = folder / "pictures", folder / "cache"
        write_pictures(pictures, count)
        runs.append(fresh(f"{HERE}:build", pictures=str(pictures), cache=str(cache)))
        shutil.rmtree(pictures)
        shutil.rmtree(cache)
    return {"pictures": list(scale.builds), "runs": runs}


def write_pictures(folder: Path, count: int) -> None:
    """So many different small PNGs, a thousand to a folder."""
    random = np.random.default_rng(0)
    for number in range(count):
        inside = folder / f"{number // 1000:04}"
        if number % 1000 == 0:
            inside.mkdir(parents=True)
        width, height = random.integers(*SIDES, 2)
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(inside / f"{number:06}.png", compress_level=0)


def build(pictures: str, cache: str) -> dict[str, Any]:
    """All that is done before training, with the mean of 8 x 8 pixels for a VAE."""
    import torch

    from data.buckets import plan_buckets
    from data.cache import LatentKeys, cache_latents
    from data.sources import scan
    from data.store import TensorStore

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small, small[:, :2]], dim=1)

    torch.set_num_threads(1)  # pictures as small as these are not worth more
    start = time.perf_counter()
    index = Path(cache) / "index.arrow"
    rows = scan(pictures, index=index, caption="a picture").table
    sizes = plan_buckets(rows.widths, rows.heights, resolutions=[64], step=8)
    scanned = time.perf_counter()
    keys = LatentKeys(rows, sizes, "vae")
    encoded = cache_latents(keys, TensorStore(cache), encode, batch_size=8)
    ended = time.perf_counter()
    return {
        "scan_seconds": round(scanned - start, 2),
        "cache_seconds": round(ended - scanned, 2),
        "encoded": encoded,
    }


def edit(folder: Path, scale: Scale) -> dict[str, Any]:
    """What one edited picture of many costs."""
    pictures, cache = folder / "pictures", folder / "cache"
    write_pictures(pictures, scale.edited)
    work = partial(fresh, f"{HERE}:build", pictures=str(pictures), cache=str(cache))
    first = work()
    Image.new("RGB", (48, 48), "red").save(pictures / "0000" / "000007.png")
    second = work()
    return {"pictures": scale.edited, "first": first, "second": second}


# Caching


def caching(folder: Path, scale: Scale) -> dict[str, Any]:
    """JPEGs to latents of the toy VAE: decoding, encoding, and both as the cache does them."""
    there = {"folder": str(folder), "photos": scale.photos, "rounds": scale.rounds}
    return fresh(f"{HERE}:cache_photos", **there)


def cache_photos(folder: str, photos: int, rounds: int) -> dict[str, Any]:
    files = [Path(folder) / f"{number}.jpg" for number in range(photos)]
    for number, file in enumerate(files):
        file.write_bytes(_photo(number, rotated=False))
    return caching_benchmark.measure(files, PHOTO, folder=Path(folder), rounds=rounds)


# The table


def _decode_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    width, height = result["bucket"]
    what = f"{result['pictures']} JPEGs of 12 megapixels to {width}x{height}, seconds"
    yield f"{what}, {result['threads']} threads", span(result["seconds"]), ""
    yield "the same by open, convert, resize (Lanczos), crop", span(result["plain_seconds"]), ""
    yield "times faster", span(result["ratio"]), "at least 2.5"


def _planning_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    what = f"buckets, account and order of {result['rows']:,} rows"
    yield f"{what}, seconds", span(result["seconds"]), "at most 10"
    yield f"{what}, peak MiB", f"{result['peak_mib']:,.0f}", "at most 1,024"


def _reading_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    gets, samples = result["gets_per_second"], result["samples_per_second"]
    yield "cached 96x96 latents read by one process, per second", span(gets, 0), "at least 3,000"
    yield "whole samples (latents, noise, embeddings), per second", span(samples, 0), ""


def _memory_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for count, run in zip(result["pictures"], result["runs"], strict=True):
        figures = (
            f"{run['peak_anonymous_mib']:,.0f} ({run['peak_mib']:,.0f} with mapped files); "
            f"{run['scan_seconds']:,.0f} s and {run['cache_seconds']:,.0f} s"
        )
        yield f"scan and cache of {count:,} pictures, peak MiB", figures, "does not grow"


def _edit_rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    second = result["second"]
    elapsed = second["scan_seconds"] + second["cache_seconds"]
    what = f"1 picture of {result['pictures']:,} edited: encoded again"
    yield what, f"{second['encoded']} (in {elapsed:.1f} s)", "1"


ROWS: dict[str, Callable[[dict[str, Any]], Iterator[tuple[str, str, str]]]] = {
    "decode": _decode_rows,
    "planning": _planning_rows,
    "reading": _reading_rows,
    "memory": _memory_rows,
    "edit": _edit_rows,
    "caching": caching_benchmark.rows,
}
