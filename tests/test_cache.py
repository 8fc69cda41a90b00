"""data/cache.py: whole entries only, keyed by content, and no encoding that is not needed."""

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.cache import (
    TensorCache,
    cache_captions,
    cache_latents,
    latent_key,
    latent_keys,
    text_key,
    text_keys,
    write_atomically,
)
from data.images import fit, open_image, to_tensor
from data.sources import Record, scan
from train.config import UserError

KEY = "ab" * 20


class Encoder:
    """Stands in for a VAE: 8x smaller, 8 channels; remembers what it was called with."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(pixels)
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small, small[:, :2]], dim=1)

    @property
    def images(self) -> int:
        return sum(len(batch) for batch in self.batches)


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 64)).save(folder / f"{seed}.png")
    return scan(folder, caption="").records


SIZES = [(32, 32), (48, 32), (32, 32), (32, 32), (48, 32)]


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path / "cache")


def fill(records, cache, encode, **changed) -> int:
    arguments: dict[str, Any] = {
        "sizes": SIZES,
        "vae_fingerprint": "vae",
        "batch_size": 2,
    } | changed
    return cache_latents(records, cache=cache, encode=encode, **arguments)


def test_entries_come_back_as_they_were(cache):
    tensors = {"a": torch.randn(2, 3).half(), "b": torch.arange(4), "c": torch.randn(1).bfloat16()}
    assert cache.get(KEY) is None and cache.names(KEY) == frozenset()
    cache.put(KEY, tensors)
    assert cache.names(KEY) == {"a", "b", "c"}
    back = cache.get(KEY)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [cache.path(KEY)]


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "text", "moved"])
def test_a_damaged_entry_is_a_miss_and_goes_away(cache, damage):
    cache.put(KEY, {"a": torch.arange(100.0)})
    path = cache.path(KEY)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-9] ^= 1
    elif damage == "header":
        content[:8] = b"\xff" * 8
    contents = {"cut": content[:-5], "empty": b"", "text": b"not safetensors"}
    path.write_bytes(contents.get(damage, content))
    key = KEY
    if damage == "moved":
        key = "ab" * 19 + "ff"
        path.rename(cache.path(key))
    if damage not in {"flip", "moved"}:  # those show only when the whole entry is read
        assert cache.names(key) == frozenset()
    assert cache.get(key) is None
    assert cache.names(key) == frozenset() and not cache.path(key).exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(UserError, match="No space"):
        TensorCache(tmp_path / "cache").put(KEY, {"a": torch.zeros(1)})


def test_keys_depend_on_everything():
    variants = [
        latent_key("s", "v", (64, 32)),
        latent_key("t", "v", (64, 32)),
        latent_key("s", "w", (64, 32)),
        latent_key("s", "v", (32, 64)),
        latent_key("s", "v", (64, 32), "focus"),
        latent_key("s", "v", (64, 32), background=(0, 0, 0)),
        text_key("s", "v", "t"),
        text_key("sv", "", "t"),
        text_key("s", "v", "u"),
    ]
    assert len(set(variants)) == len(variants)


def test_latents_are_the_encoders_for_the_fitted_picture_and_its_mirror(records, cache):
    encode = Encoder()
    assert fill(records, cache, encode, flip=True) == 5
    for record, size, key in zip(records, SIZES, latent_keys(records, SIZES, "vae"), strict=True):
        pixels = to_tensor(fit(open_image(record.path), size))[None]
        entry = cache.get(key)
        assert entry.keys() == {"moments", "moments_flipped"}
        assert entry["moments"].dtype == torch.float16
        assert torch.equal(entry["moments"], encode(pixels)[0].half())
        assert torch.equal(entry["moments_flipped"], encode(pixels.flip(-1))[0].half())


def test_batches_have_one_size_and_nothing_is_encoded_twice(records, cache):
    encode = Encoder()
    assert fill(records, cache, encode) == 5
    assert sorted(tuple(batch.shape) for batch in encode.batches) == [
        (1, 3, 32, 32),
        (2, 3, 32, 32),
        (2, 3, 32, 48),
    ]
    assert fill(records, cache, encode) == 0 and encode.images == 5
    copy = dataclasses.replace(records[0], id="copy.png")
    assert fill([*records, copy], cache, encode, sizes=[*SIZES, SIZES[0]]) == 0
    assert fill([*records, copy], cache, encode, sizes=[*SIZES, (64, 64)]) == 1


def test_only_the_missing_half_is_encoded(records, cache):
    fill(records, cache, Encoder())
    before = cache.get(latent_keys(records, SIZES, "vae")[1])["moments"]
    encode = Encoder()
    assert fill(records, cache, encode, flip=True) == 5 and encode.images == 5
    entry = cache.get(latent_keys(records, SIZES, "vae")[1])
    assert torch.equal(entry["moments"], before) and "moments_flipped" in entry


def test_what_changed_is_encoded_anew(records, cache):
    fill(records, cache, Encoder())
    assert fill(records, cache, Encoder(), vae_fingerprint="other") == 5
    assert fill(records, cache, Encoder(), sizes=[(32, 32)] * 5) == 2
    assert fill(records, cache, Encoder(), background=(0, 0, 0)) == 5
    Image.new("RGB", (96, 64)).save(records[0].path)
    assert fill(scan(records[0].path.parent, caption="").records, cache, Encoder()) == 1
    cache.path(latent_keys(records, SIZES, "vae")[3]).write_bytes(b"damaged")
    encode = Encoder()
    assert fill(records[1:], cache, encode, sizes=SIZES[1:]) == 1 and encode.images == 1


def test_processes_share_the_work(records, cache):
    counts = [fill(records, cache, Encoder(), rank=rank, world=3) for rank in range(3)]
    assert counts == [2, 2, 1]
    assert fill(records, cache, Encoder()) == 0


def test_a_picture_edited_since_the_scan_is_not_cached(records, cache):
    Image.new("RGB", (96, 64)).save(records[2].path)
    with pytest.raises(UserError, match="2.png changed"):
        fill(records, cache, Encoder())


def test_latents_that_are_not_finite_name_the_picture(records, cache):
    with pytest.raises(UserError, match=r"0\.png.*not finite"):
        fill(records, cache, lambda pixels: Encoder()(pixels) * 1e6)


def test_progress_may_stop_and_what_is_done_stays(records, cache):
    def stop(done: int, total: int) -> None:
        assert total == 5
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(records, cache, Encoder(), progress=stop)
    assert fill(records, cache, Encoder()) < 5


def embed(captions: list[str]) -> torch.Tensor:
    return torch.stack([torch.full((7, 4), float(len(caption))) for caption in captions])


def test_captions_are_encoded_once_each_with_the_empty_one(cache):
    calls: list[str] = []

    def encode(captions: list[str]) -> torch.Tensor:
        calls.extend(captions)
        return embed(captions)

    captions = ["b", "aa", "b", "ccc"]
    prints = {"text_encoder_fingerprint": "t", "tokenizer_fingerprint": "k"}
    assert cache_captions(captions, cache, encode, batch_size=3, **prints) == 4
    assert sorted(calls) == ["", "aa", "b", "ccc"]
    for caption, key in text_keys(captions, "t", "k").items():
        embeddings = cache.get(key)["embeddings"]
        assert embeddings.dtype == torch.float16
        assert torch.equal(embeddings.float(), embed([caption])[0])
    assert cache_captions(captions, cache, encode, **prints) == 0 and len(calls) == 4
    other = prints | {"tokenizer_fingerprint": "l"}
    counts = [
        cache_captions(captions, cache, embed, rank=rank, world=2, **other) for rank in (0, 1)
    ]
    assert counts == [2, 2]
    with pytest.raises(UserError, match="'new'"):
        cache_captions(["new"], cache, lambda captions: embed(captions) / 0, **prints)


def _write_forever(folder: Path) -> None:
    cache, value = TensorCache(folder), 0
    while True:
        cache.put(KEY, {"a": torch.full((50_000,), float(value))})
        value += 1


def test_a_killed_writer_leaves_whole_entries(cache):
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(
            target=_write_forever, args=(cache.folder,)
        )
        process.start()
        while not cache.path(KEY).exists():
            pass
        process.join(0.05)
        process.kill()
        process.join()
        entry = cache.get(KEY)
        assert entry is not None and bool((entry["a"] == entry["a"][0]).all())
