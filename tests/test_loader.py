"""data/loader.py: the same samples and the same noise, however the work is split."""

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from data.loader import TrainingSet, cut, loader, packed, unpacked
from data.noising import Noising
from data.order import Order
from data.records import Record
from data.store import TensorStore
from data.wording import Wording
from train.config import ROOT, DiffusionConfig, UserError

SIZES = np.array([(64, 64)] * 4 + [(32, 64)] * 2 + [(64, 32)])  # 7 images, 3 aspects
CAPTIONS = ["", *(f"caption {n}" for n in range(7))]


class Keys(NamedTuple):
    """Two crops of each picture if `crops`, else one."""

    crops: int = 1

    def keys(self, index: int, record: Record | None = None) -> list[str]:
        return [f"{index:020x}{crop:020x}" for crop in range(self.crops)]


def embedding_key(caption: str) -> str:
    return f"{CAPTIONS.index(caption) + 100:040x}"


def records(**changed: Any) -> list[Record]:
    return [
        Record(f"{n}.png", f"file:/{n}.png", (f"caption {n}",), int(w), int(h), str(n), **changed)
        for n, (w, h) in enumerate(SIZES)
    ]


def order(**changed: Any) -> Order:
    return Order(SIZES, **({"seed": 11, "batch_size": 3} | changed))


def training_set(folder: Path, **changed: Any) -> TrainingSet:
    if not folder.exists():
        _fill(TensorStore(folder))
    arguments: dict[str, Any] = {
        "records": records(),
        "order": order(),
        "wordings": [Wording()],
        "store": TensorStore(folder),
        "latent_keys": Keys(),
        "embedding_key": embedding_key,
        "seed": 11,
        "scaling_factor": 0.5,
        "noising": Noising.of(DiffusionConfig(), 1000),
        "flip": True,
        "caption_dropout": 0.3,
    }
    return TrainingSet(**(arguments | changed))


def _fill(store: TensorStore) -> None:
    """Means are the picture's number (a thousand more in the second crop), or minus it where
    mirrored; standard deviations are 2. Masks and depth rise from left to right."""
    with store.writer() as writer:
        for number, (width, height) in enumerate(SIZES // 8):
            ramp = torch.linspace(0, 1, int(width)).expand(1, int(height), int(width)).half()
            beside = {"mask": ramp, "depth": 2 * ramp - 1}
            for crop, key in enumerate(Keys(2).keys(number)):
                mean = torch.full((4, height, width), 100.0 * (number + 1) + 1000 * crop)
                spread = torch.full_like(mean, 2 * torch.log(torch.tensor(2.0)).item())
                moments = {
                    name: torch.cat([sign * mean, spread]).half()
                    for name, sign in (("moments", 1), ("moments_flipped", -1))
                }
                writer.put(key, moments | beside)
        for number, caption in enumerate(CAPTIONS):  # "" is number 0, the last takes two windows
            length = 10 if number == 7 else 5
            embeddings = torch.full((length, 3), float(number)).half()
            writer.put(embedding_key(caption), {"embeddings": embeddings})


@pytest.fixture
def data(tmp_path) -> TrainingSet:
    return training_set(tmp_path / "cache")


def steps(data: TrainingSet, start: int, stop: int, **split) -> list[list[dict]]:
    return list(loader(data, start=start, stop=stop, **({"micro_batch_size": 8} | split)))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name])
        if isinstance(one[name], torch.Tensor)
        else one[name] == other[name]
        for name in one
    )


def by_id(micro_batches: list[dict]) -> dict[str, list[tuple]]:
    """The samples that count, without their order."""
    found: dict[str, list[tuple]] = {}
    for batch in micro_batches:
        for row, name in enumerate(batch["ids"]):
            if batch["weight"][row] > 0:
                tensors = [batch[key][row] for key in sorted(batch.keys() - {"ids"})]
                found.setdefault(name, []).append(tuple(t.numpy().tobytes() for t in tensors))
    return found


def test_an_epoch_has_every_picture_in_batches_of_one_size(data):
    for epoch in range(2):
        each = data.order.batches_in(0)
        batches = [step[0] for step in steps(data, epoch * each, (epoch + 1) * each)]
        seen = [name for batch in batches for name in batch["ids"]]
        assert sorted(seen) == sorted(record.id for record in data.records)
        assert all(batch["latents"].shape == batch["noise"].shape for batch in batches)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_any_number_of_processes_sees_the_same(data, world, micro_batch_size):
    alone = steps(data, 0, 8)
    split = [
        steps(data, 0, 8, rank=rank, world=world, micro_batch_size=micro_batch_size)
        for rank in range(world)
    ]
    for step, whole in enumerate(alone):
        parts = [split[rank][step] for rank in range(world)]
        assert by_id(list(itertools.chain(*parts))) == by_id(whole)
        shapes = [[batch["latents"].shape for batch in part] for part in parts]
        assert all(shape == shapes[0] for shape in shapes)
        assert all(len(batch["ids"]) <= micro_batch_size for part in parts for batch in part)
        assert len({batch["prompt_embeds"].shape[1] for part in parts for batch in part}) == 1
        weights = torch.cat([batch["weight"] for part in parts for batch in part])
        assert weights.sum().item() == pytest.approx(1)
        assert len(set(weights.tolist()) - {0}) == 1
        assert (weights == 0).sum() == -len(whole[0]["ids"]) % world


def test_starting_late_is_the_tail_of_starting_early(data, tmp_path):
    whole = steps(data, 0, 10, rank=1, world=2, micro_batch_size=1)
    tail = steps(training_set(tmp_path / "cache"), 3, 10, rank=1, world=2, micro_batch_size=1)
    assert len(tail) == 7
    for early, late in zip(whole[3:], tail, strict=True):
        assert all(same(*pair) for pair in zip(early, late, strict=True))


def test_workers_change_nothing_and_the_global_state_stays(data):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, helped = steps(data, 0, 6), steps(data, 0, 6, workers=2)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(alone, helped, strict=True):
        assert all(same(*pair) for pair in zip(one, other, strict=True))


def test_latents_are_drawn_from_the_moments_and_scaled(data):
    number = 2
    draws = [data.sample(step, number)["latents"] for step in range(40)]
    signs = {bool(latents.mean() > 0) for latents in draws}
    assert signs == {True, False}  # both the picture and its mirror
    upright = torch.stack([latents for latents in draws if latents.mean() > 0])
    assert upright.shape[1:] == (4, 8, 8) and upright.dtype == torch.float32
    assert upright.mean().item() == pytest.approx(300 * 0.5, abs=0.1)
    assert upright.std().item() == pytest.approx(2 * 0.5, abs=0.05)
    assert 8 <= len(upright) <= 32


def test_noise_timesteps_and_dropout_are_new_at_every_step_and_sample(data):
    samples = [data.sample(step, index) for step in range(60) for index in (0, 1)]
    assert len({sample["noise"].numpy().tobytes() for sample in samples}) == len(samples)
    noise = torch.cat([sample["noise"].flatten() for sample in samples])
    assert abs(noise.mean().item()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([noise[:-256], noise[256:]]))[0, 1].item()) < 0.03
    latents = (samples[0]["latents"] - samples[0]["latents"].mean()).flatten()
    pair = torch.stack([latents, samples[0]["noise"].flatten()])
    assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.2  # not the noise the latents were drawn with
    timesteps = [sample["timestep"] for sample in samples]
    assert 0 <= min(timesteps) < 50 and 950 < max(timesteps) < 1000
    dropped = sum(bool((sample["prompt_embeds"] == 0).all()) for sample in samples)
    assert 20 <= dropped <= 52  # 30 % of 120


@pytest.mark.parametrize(("share", "captions"), [(0.0, {"caption 0"}), (1.0, {""})])
def test_dropout_of_none_and_of_all_and_ids_for_a_text_encoder(data, tmp_path, share, captions):
    seen: set[str] = set()

    def tokenize(texts: list[str]) -> torch.Tensor:
        seen.update(texts)
        return torch.tensor([[len(text), 1] for text in texts])

    changed = {"embedding_key": None, "tokenize": tokenize, "caption_dropout": share}
    trained = training_set(tmp_path / "cache", flip=False, **changed)
    samples = [trained.sample(step, 0) for step in range(20)]
    assert seen == captions
    assert all(sample["latents"].mean() > 0 for sample in samples)
    assert "prompt_embeds" not in samples[0]
    batch = trained.gather(0, rank=0, world=1)
    assert batch["input_ids"].shape == (len(batch["ids"]), 2)
    assert batch["timestep"].dtype == torch.int64 and batch["weight"].dtype == torch.float32


def test_ids_are_as_long_as_the_longest_caption_of_all_processes_needs(tmp_path):
    def tokenize(texts: list[str]) -> torch.Tensor:
        longest = max(len(text) for text in texts)
        return torch.tensor([[int(text[-1])] * longest for text in texts])

    long = [Record(f"{n}", "", ("x" * n + str(n),), 64, 64, "") for n in range(7)]
    changed = {"embedding_key": None, "tokenize": tokenize, "caption_dropout": 0.0}
    trained = training_set(tmp_path / "cache", records=long, **changed)
    whole = trained.gather(0, rank=0, world=1)
    assert whole["input_ids"].shape[1] == max(int(name) for name in whole["ids"]) + 1
    for rank in range(2):
        part = trained.gather(0, rank=rank, world=2)
        assert part["input_ids"].shape[1] == whole["input_ids"].shape[1]
        assert part["input_ids"][:, 0].tolist() == [int(name) for name in part["ids"]]


def test_short_captions_beside_long_ones_end_in_windows_of_the_empty_caption(tmp_path):
    same_size = np.array([(64, 64)] * 7)
    alike = [Record(str(n), "", (f"caption {n}",), 64, 64, "") for n in (0, 6)]
    trained = training_set(
        tmp_path / "cache",
        records=alike,
        order=Order(same_size[:2], seed=0, batch_size=2),
        caption_dropout=0.0,
    )
    alone = [trained.gather(0, rank=rank, world=2) for rank in range(2)]
    rows = {batch["ids"][0]: batch["prompt_embeds"][0, :, 0].tolist() for batch in alone}
    assert rows == {"0": [1.0] * 5 + [0.0] * 5, "6": [7.0] * 10}


def test_one_of_several_crops_is_drawn_at_each_step(tmp_path):
    trained = training_set(tmp_path / "cache", latent_keys=Keys(2), flip=False)
    crops = [bool(trained.sample(step, 0)["latents"].mean() > 500) for step in range(60)]
    assert 15 < sum(crops) < 45


def test_masks_and_depth_turn_with_the_picture_and_are_ones_where_there_is_none(tmp_path):
    beside = {"mask_sha256": "m", "depth_sha256": "d"}
    trained = training_set(tmp_path / "cache", records=records(**beside), masks=True)
    samples = [trained.sample(step, 0) for step in range(20)]
    for sample in samples:
        mask, depth = sample["mask"], sample["depth"]
        assert mask.shape == depth.shape == (1, 8, 8) and mask.dtype == torch.float32
        assert bool(mask[0, 0, 0] == 0) == bool(sample["latents"].mean() > 0)
        torch.testing.assert_close(depth, 2 * mask - 1, atol=1e-3, rtol=0)
    assert {bool(sample["mask"][0, 0, 0] == 0) for sample in samples} == {True, False}
    unmasked = training_set(tmp_path / "cache", masks=True).gather(0, rank=0, world=1)
    assert torch.equal(unmasked["mask"], torch.ones_like(unmasked["latents"][:, :1]))
    assert "depth" not in unmasked
    assert "mask" not in training_set(tmp_path / "cache", records=records(**beside)).sample(0, 0)


def test_sources_have_their_own_wording_and_repeats_their_own_randomness(tmp_path):
    said: list[str] = []

    def tokenize(texts: list[str]) -> torch.Tensor:
        said.extend(texts)
        return torch.zeros(len(texts), 77, dtype=torch.int64)

    sources = np.array([0, 1] * 3 + [0])
    trained = training_set(
        tmp_path / "cache",
        sources=sources,
        wordings=[Wording(), Wording(prefix="a painting, ")],
        order=order(batch_size=100, sources=sources, repeats=[1, 3]),
        embedding_key=None,
        tokenize=tokenize,
        caption_dropout=0.0,
    )
    batches = [trained.gather(step, rank=0, world=1) for step in range(3)]
    names = [name for batch in batches for name in batch["ids"]]
    assert len(names) == 4 + 3 * 3
    origins = torch.cat([batch["source"] for batch in batches]).tolist()
    assert origins == [int(sources[int(name[0])]) for name in names]
    assert all(
        text.startswith("a painting, ") == bool(o) for text, o in zip(said, origins, strict=True)
    )
    noise = {row.numpy().tobytes() for batch in batches for row in batch["noise"]}
    assert len(noise) == len(names)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_entry_is_one_clear_message(data, workers):
    for file in (data.store.folder / "shards").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="run the command again") as caught:
        steps(data, 0, 2, workers=workers)
    assert "Traceback" not in str(caught.value)


def test_it_travels_to_another_process(data):
    copy = pickle.loads(pickle.dumps(data))
    assert same(copy.sample(3, 4), data.sample(3, 4))
    assert same(copy.gather(9, rank=1, world=2), data.gather(9, rank=1, world=2))


def test_a_batch_is_cut_into_micro_batches(data):
    batch = data.gather(0, rank=0, world=1)
    parts = cut(batch, 2)
    assert [len(part["ids"]) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part["noise"] for part in parts]), batch["noise"])


KEPT = """
import torch
from data import loader

class Steps:
    def __len__(self):
        return 9

    def __getitem__(self, step):
        return {"weight": torch.ones(1)}

loader._Steps, loader.cut = (lambda *_: Steps()), (lambda batch, _: [batch])
loader.unpacked = lambda batch: batch
batches = loader.loader(None, start=0, stop=9, micro_batch_size=1, workers=2)
next(batches)
raise ValueError("an error that keeps them alive")
"""


def test_workers_never_outlive_a_run_that_fails():
    """They ignore the signal by which Python ends them at its own end."""
    ended = subprocess.run(
        [sys.executable, "-c", KEPT], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and ended.stderr.endswith("keeps them alive\n")


def test_a_batch_survives_being_packed_whatever_it_holds():
    torch.manual_seed(0)
    batch = {
        "prior": torch.tensor([True, False, True]),
        "latents": torch.randn(3, 4, 5, 7).transpose(2, 3),
        "timestep": torch.tensor([1, 2, 999]),
        "weight": torch.tensor([0.5, 0.25, 0.25]),
        "ids": ["a", "b", "c"],
        "empty": torch.zeros(3, 0),
    }
    whole = packed(batch)
    assert whole["bytes"].dtype == torch.uint8 and whole["bytes"].dim() == 1
    found = unpacked(whole)
    assert found.keys() == batch.keys() and found["ids"] == batch["ids"]
    for name in batch.keys() - {"ids"}:
        assert found[name].dtype == batch[name].dtype and torch.equal(found[name], batch[name])
