"""data/cache.py and maps.py: keyed by content, and no encoding that is not needed."""

import dataclasses
import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import maps, toy
from data.cache import (
    DECODERS,
    LatentKeys,
    cache_captions,
    cache_latents,
    one_behind,
    text_key,
)
from data.images import crop_centres, fit, fit_geometry, open_image, to_tensor
from data.records import Joined, Record, Table
from data.store import TensorStore
from train.config import UserError

WHOLE = (0.0, 0.0, 1.0, 1.0)


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
        """Different ones: a batch is filled up by repeating its last."""
        return sum(len(torch.unique(batch, dim=0)) for batch in self.batches)


def record(path: Path, **changed: Any) -> Record:
    width, height = Image.open(path).size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    values = {"captions": ("",), "width": width, "height": height, "sha256": digest}
    return Record(id=path.name, location=f"file:{path}", **(values | changed))


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 64)).save(folder / f"{seed}.png")
    return [record(folder / f"{seed}.png") for seed in range(5)]


SIZES = np.array([(32, 32), (48, 32), (32, 32), (32, 32), (48, 32)], np.int32)


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "cache")


def keys_of(records, sizes=SIZES, **changed) -> LatentKeys:
    changed = {"vae_fingerprint": "vae"} | changed
    return LatentKeys(records, np.asarray(sizes, np.int32), **changed)


def fill(keys: LatentKeys, store: TensorStore, encode=None, **changed) -> int:
    return cache_latents(keys, store, encode or Encoder(), **({"batch_size": 2} | changed))


def test_keys_depend_on_everything(records):
    one = records[0]
    changes: list[dict[str, Any]] = [
        {"sha256": "t"},
        {"mask_sha256": "m"},
        {"depth_sha256": "m"},
    ]
    pictures = [one, *(dataclasses.replace(one, **change) for change in changes)]
    found = [keys_of([picture], [(48, 32)]).keys(0)[0] for picture in pictures]
    for changed in (
        {"vae_fingerprint": "w"},
        {"sizes": [(32, 48)]},
        {"sizes": [(96, 64)]},
        {"background": (0, 0, 0)},
    ):
        found += keys_of([one], **({"sizes": [(48, 32)]} | changed)).keys(0)
    found += [text_key("s", "v", "t"), text_key("sv", "", "t"), text_key("s", "v", "u")]
    assert len(set(found)) == len(found)
    moved = dataclasses.replace(one, id="other", location="row:1", captions=("x",), focus=(0, 0))
    assert keys_of([moved], [(48, 32)]).keys(0) == found[:1]


def test_crops_of_one_picture_have_keys_of_their_own(records):
    focused = dataclasses.replace(records[0], focus=(0.9, 0.5))
    square = [(32, 32)]
    centre = keys_of([focused], square).keys(0)
    focus = keys_of([focused], square, crops=["focus"]).keys(0)
    three, four = (
        keys_of([focused], square, crops=["random"], crop_variants=count).keys(0)
        for count in (3, 4)
    )
    assert len({*centre, *focus, *four}) == 6 and four[:3] == three
    exact = keys_of([focused], [(48, 32)], crops=["random"]).keys(0)
    assert len(exact) == 4 and {*exact} == {*keys_of([focused], [(48, 32)]).keys(0)}


def test_each_source_is_cropped_in_its_own_way(records):
    joined = Joined({"a": Table.of(records[:2]), "b": Table.of(records[2:])})
    keys = keys_of(joined, [(32, 32)] * 5, crops=["centre", "random"], sources=joined.sources)
    assert [len(keys.keys(index)) for index in range(5)] == [1, 1, 4, 4, 4]


def test_latents_are_the_encoders_for_the_fitted_picture_and_its_mirror(records, store):
    keys, encode = keys_of(Table.of(records)), Encoder()
    assert fill(keys, store, encode, flip=True) == 5
    for index, picture in enumerate(records):
        pixels = to_tensor(fit(open_image(picture.path), keys.size(index)))[None]
        entry = store.get(*keys.keys(index))
        assert entry.keys() == {"moments", "moments_flipped"}
        assert entry["moments"].dtype == torch.float16
        assert torch.equal(entry["moments"], encode(pixels)[0].half())
        assert torch.equal(entry["moments_flipped"], encode(pixels.flip(-1))[0].half())


def test_every_random_crop_is_encoded(records, store):
    keys = keys_of(records, crops=["random"])
    assert fill(keys, store) == 3 * 4 + 2  # those of 48 x 32 have nothing to crop
    picture = records[0]
    size = (96, 64), (32, 32), picture.sha256
    centres = crop_centres(*size[0], size[1], crop="random", focus=None, sha256=size[2], variants=4)
    for key, centre in zip(keys.keys(0), centres, strict=True):
        pixels = to_tensor(fit(open_image(picture.path), (32, 32), centre))[None]
        assert torch.equal(store.get(key)["moments"], Encoder()(pixels)[0].half())


def test_batches_have_one_size_and_nothing_is_encoded_twice(records, store):
    encode = Encoder()
    assert fill(keys_of(records), store, encode) == 5
    assert sorted(tuple(batch.shape) for batch in encode.batches) == [
        (2, 3, 32, 32),
        (2, 3, 32, 32),
        (2, 3, 32, 48),
    ]
    assert fill(keys_of(records), store, encode) == 0 and encode.images == 5
    copy = [*records, dataclasses.replace(records[0], id="copy.png")]
    assert fill(keys_of(copy, [*SIZES, SIZES[0]]), store, encode) == 0
    assert fill(keys_of(copy, [*SIZES, (64, 64)]), store, encode) == 1
    assert fill(keys_of(copy, [*SIZES, SIZES[0]], vae_fingerprint="new"), store, encode) == 5
    assert fill(keys_of([], np.empty((0, 2))), store, encode) == 0


def test_only_the_missing_half_is_encoded(records, store):
    keys, encode = keys_of(records), Encoder()
    fill(keys, store)
    before = store.get(*keys.keys(1))["moments"]
    assert fill(keys, store, encode, flip=True) == 5 and encode.images == 5
    entry = store.get(*keys.keys(1))
    assert torch.equal(entry["moments"], before) and "moments_flipped" in entry


def test_what_changed_is_encoded_anew_and_nothing_else(records, store):
    fill(keys_of(records), store)
    assert fill(keys_of(records, vae_fingerprint="other"), store) == 5
    assert fill(keys_of(records, [(32, 32)] * 5), store) == 2
    assert fill(keys_of(records, background=(0, 0, 0)), store) == 5
    Image.new("RGB", (96, 64)).save(records[0].path)
    assert fill(keys_of([record(records[0].path), *records[1:]]), store) == 1


def test_what_is_damaged_is_encoded_anew(records, store):
    keys, encode = keys_of(records), Encoder()
    fill(keys, store)
    (shard,) = store.shards.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    assert [store.get(*keys.keys(index)) is None for index in range(5)].count(True) == 1
    assert fill(keys, TensorStore(store.folder), encode) == encode.images == 1


def test_a_complete_cache_is_only_read(records, store, monkeypatch):
    fill(keys_of(records), store)
    monkeypatch.setattr(TensorStore, "writer", None)
    assert fill(keys_of(records), store) == 0


def test_processes_share_the_work(records, store):
    stores = [TensorStore(store.folder) for _ in range(3)]
    counts = [fill(keys_of(records), stores[rank], rank=rank, world=3) for rank in range(3)]
    assert counts == [2, 2, 1]
    assert fill(keys_of(records), store) == 0


def test_a_picture_edited_since_the_scan_is_not_cached(records, store):
    Image.new("RGB", (96, 64)).save(records[2].path)
    with pytest.raises(UserError, match="2.png changed"):
        fill(keys_of(records), store)


def test_pictures_that_pass_once_are_read_as_the_caller_says(records, store):
    contents = {picture.id: picture.read() for picture in records}
    streamed = [dataclasses.replace(picture, location="stream:") for picture in records]
    assert fill(keys_of(streamed), store, read=lambda picture: contents[picture.id]) == 5
    assert fill(keys_of(records), store) == 0


def test_latents_that_are_not_finite_name_the_picture(records, store):
    with pytest.raises(UserError, match=r"0\.png.*not finite"):
        fill(keys_of(records), store, lambda pixels: Encoder()(pixels) * 1e6)


def test_progress_may_stop_and_what_is_done_stays(records, store):
    def stop(done: int, total: int) -> None:
        assert total == 5
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(keys_of(records), store, progress=stop)
    assert fill(keys_of(records), store) == 3


def test_pictures_are_read_ahead_but_not_without_bound(records, store):
    read, ahead = [], []
    threads = set()

    def reader(picture: Record) -> bytes:
        threads.add(threading.get_ident())
        read.append(picture.id)
        return picture.read()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        ahead.append(len(read) - len(ahead) - 1)
        return Encoder()(pixels)

    many = [dataclasses.replace(records[0], mask_sha256=str(number)) for number in range(60)]
    fill(keys_of(many, [(32, 32)] * 60), store, encode, batch_size=1, read=reader)
    assert len(read) == 60 and threading.get_ident() not in threads
    assert max(ahead) <= DECODERS + 1


def test_a_batch_is_written_once_the_next_is_on_its_way(records, store, monkeypatch):
    order: list[str] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        order.append("encode")
        return Encoder()(pixels)

    def progress(done: int, total: int) -> None:
        order.append(f"written {done}")

    fill(keys_of(records, [(32, 32)] * 5), store, encode, progress=progress)
    assert order == ["encode", "encode", "written 2", "encode", "written 4", "written 5"]


def test_what_was_encoded_before_an_error_is_kept(records, store):
    Image.new("RGB", (96, 64)).save(records[4].path)
    changed, keys = [], keys_of(records, [(32, 32)] * 5)
    with pytest.raises(UserError, match="4.png changed"):
        fill(keys, store, progress=lambda done, total: changed.append(done))
    assert changed == [2, 4]
    assert [bool(TensorStore(store.folder).names(*keys.keys(i))) for i in range(5)] == (
        [True] * 4 + [False]
    )


def test_what_follows_one_behind_is_the_same_in_order():
    assert list(one_behind(range(4))) == [0, 1, 2, 3] and not list(one_behind([]))
    walk = one_behind(iter(range(9)))
    assert next(walk) == 0
    walk.close()


def test_latents_encoded_in_bf16_have_other_keys_and_deviate_little(tmp_path):
    """Of the toy VAE's latents of its own pictures: 0.3 % of their deviation, and 1.6 % of a log
    variance, which is 0.6 % of a noise that is 0.5 % of the latents."""
    from diffusers import AutoencoderKL

    from train.config import ROOT
    from train.models import fingerprint, latent_encoder, latent_fingerprint

    vae = AutoencoderKL.from_pretrained(ROOT / "data/assets/toy-base", subfolder="vae").eval()
    before = fingerprint(vae)
    toy.write_pictures(tmp_path, 8, seed=0, square=True)
    pictures = [to_tensor(fit(open_image(p), (128, 128))) for p in sorted(tmp_path.glob("*.png"))]
    pixels = torch.stack(pictures)
    exact, close = (latent_encoder(vae, how)(pixels) for how in ("fp32", "bf16"))
    assert close.dtype == torch.float32 and fingerprint(vae) == before  # as it was
    (means, log_variances), (others, other_variances) = exact.chunk(2, 1), close.chunk(2, 1)
    assert 1e-4 < (others - means).square().mean().sqrt() / means.std() < 6e-3
    assert (other_variances - log_variances).square().mean().sqrt() < 0.03
    assert latent_fingerprint(vae) == before  # so what is cached already stays of use
    assert latent_fingerprint(vae, "bf16") != before


# Masks and depth


def png(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def half_white(width: int, height: int) -> np.ndarray:
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    return pixels


def test_a_mask_is_the_mean_over_each_latents_place():
    mask = maps.mask_latent(png(half_white(96, 64)), (96, 64), WHOLE)
    assert mask.shape == (1, 8, 12) and mask.dtype == torch.float16
    assert (mask[..., :6] == 0).all() and (mask[..., 6:] == 1).all()
    mixed = maps.mask_latent(png(half_white(96, 64)), (24, 16), WHOLE)
    assert mixed[0, 0].tolist() == [0.0, 0.5, 1.0]
    smaller = maps.mask_latent(png(half_white(12, 8)), (96, 64), WHOLE)
    assert torch.equal(smaller, mask)


def test_a_mask_is_cropped_and_turned_with_its_picture():
    left = maps.mask_latent(png(half_white(96, 64)), (32, 32), (0, 0, 2 / 3, 1))
    assert left[0, 0].tolist() == [0, 0, 0, 1]
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise: its right becomes the bottom
    upright = maps.mask_latent(png(half_white(64, 32), exif=turned), (32, 64), WHOLE)
    assert upright.shape == (1, 8, 4)
    assert (upright[:, :4] == 0).all() and (upright[:, 4:] == 1).all()


@pytest.mark.parametrize("kind, most", [(np.uint8, 250), (np.uint16, 60_000)])
def test_depth_is_scaled_by_its_own_extremes(kind, most):
    steps = np.repeat(np.linspace(most / 5, most, 12), 8)
    content = png(np.tile(steps, (64, 1)).astype(kind))
    depth = maps.depth_latent(content, (96, 64), WHOLE)
    assert depth.shape == (1, 8, 12) and depth.dtype == torch.float16
    assert float(depth.min()) == -1 and float(depth.max()) == 1
    expected = torch.linspace(-1, 1, 12)
    assert (depth[0, 3].float() - expected).abs().max() < 0.06
    part = maps.depth_latent(content, (32, 32), (0, 0, 1 / 2, 1))
    assert float(part.max()) == 1


def test_depth_without_differences_is_zero():
    assert not maps.depth_latent(png(np.full((32, 32), 7, np.uint8)), (32, 32), WHOLE).any()


def test_depth_is_resized_as_torch_does():
    values = np.random.default_rng(0).integers(0, 65_535, (6, 8)).astype(np.uint16)
    depth = maps.depth_latent(png(values), (128, 96), WHOLE)
    wide = torch.from_numpy(values.astype(np.float32))[None, None]
    there = torch.nn.functional.interpolate(wide, (12, 16), mode="bicubic", antialias=True)
    there = 2 * (there - there.min()) / (there.max() - there.min()) - 1
    assert (depth.float() - there[0]).abs().max() < 2e-3


def test_masks_and_depth_are_cached_with_the_latents(records, store, tmp_path):
    mask, depth = tmp_path / "mask.png", tmp_path / "depth.png"
    mask.write_bytes(png(half_white(96, 64)))
    depth.write_bytes(png(half_white(96, 64)))
    sums = {name: hashlib.sha256(mask.read_bytes()).hexdigest() for name in ("mask", "depth")}
    both = dataclasses.replace(
        records[0],
        mask=str(mask),
        mask_sha256=sums["mask"],
        depth=str(depth),
        depth_sha256=sums["depth"],
    )
    keys = keys_of([both, *records[1:]])
    fill(keys, store)
    entry = store.get(*keys.keys(0))
    assert entry.keys() == {"moments", "mask", "depth"}
    box = maps.relative(fit_geometry(96, 64, (32, 32)).box, 96, 64)
    assert torch.equal(entry["mask"], maps.mask_latent(mask.read_bytes(), (32, 32), box))
    assert torch.equal(entry["depth"], maps.depth_latent(depth.read_bytes(), (32, 32), box))
    assert store.names(*keys.keys(2)) == {"moments"}
    mask.write_bytes(png(half_white(32, 32)))
    with pytest.raises(UserError, match=r"mask\.png changed"):
        fill(keys_of([both], [(96, 64)]), store)


# Captions


def embed(captions: list[str]) -> list[torch.Tensor]:
    """One window of 7 for each letter."""
    return [torch.full((7 * max(len(text), 1), 4), float(len(text))) for text in captions]


def test_captions_are_encoded_once_each_with_the_empty_one(store):
    calls: list[str] = []

    def encode(captions: list[str]) -> list[torch.Tensor]:
        calls.extend(captions)
        return embed(captions)

    captions = ["b", "aa", "b", "ccc"]
    prints = {"text_encoder_fingerprint": "t", "tokenizer_fingerprint": "k"}
    assert cache_captions(captions, store, encode, batch_size=3, **prints) == 4
    assert sorted(calls) == ["", "aa", "b", "ccc"]
    for caption in ["", *captions]:
        embeddings = store.get(text_key(caption, "t", "k"))["embeddings"]
        assert embeddings.dtype == torch.float16
        assert torch.equal(embeddings.float(), embed([caption])[0])
    assert cache_captions(captions, store, encode, **prints) == 0 and len(calls) == 4
    other = prints | {"tokenizer_fingerprint": "l"}
    counts = [
        cache_captions(captions, store, embed, rank=rank, world=2, **other) for rank in (0, 1)
    ]
    assert counts == [2, 2]
    with pytest.raises(UserError, match="'new'"):
        cache_captions(["new"], store, lambda texts: [e / 0 for e in embed(texts)], **prints)


def test_latents_do_not_depend_on_what_else_was_missing(tmp_path):
    """A build that was killed groups what is left in another way."""
    from tests.tiny import tiny_pipeline
    from train.models import latent_encoder

    encode = latent_encoder(tiny_pipeline().vae.eval())
    toy.write_pictures(tmp_path / "pictures", 7, seed=0)
    made = [record(path) for path in sorted((tmp_path / "pictures").glob("*.png"))]
    sizes = [(64, 64)] * len(made)
    stores = [TensorStore(tmp_path / name) for name in ("whole", "killed")]
    fill(keys_of(made, sizes), stores[0], encode, batch_size=4)
    for some in (made[2:3], made[:4], made):
        fill(keys_of(some, sizes[: len(some)]), stores[1], encode, batch_size=4)
    keys = keys_of(made, sizes)
    for index in range(len(made)):
        one, other = (store.get(keys.keys(index)[0])["moments"] for store in stores)
        assert torch.equal(one, other)
