"""data/loader.py: the same samples and the same noise, however the work is split."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from data.cache import TensorCache, text_keys
from data.loader import TrainingSet, loader
from data.sources import Record
from train.config import UserError

SIZES = [(64, 64)] * 4 + [(32, 64)] * 2 + [(64, 32)]  # 7 images, 3 aspects


def training_set(folder: Path, **changed) -> TrainingSet:
    records = [
        Record(f"{n}.png", Path(), f"caption {n}", width, height, str(n))
        for n, (width, height) in enumerate(SIZES)
    ]
    cache = TensorCache(folder)
    keys = [f"{n:040x}" for n in range(len(records))]
    embedding_keys = text_keys([record.caption for record in records], "t", "k")
    if not folder.exists():
        _fill(cache, keys, embedding_keys)
    arguments: dict[str, Any] = {
        "records": records,
        "sizes": SIZES,
        "cache": cache,
        "latent_keys": keys,
        "embedding_keys": embedding_keys,
        "seed": 11,
        "batch_size": 3,
        "scaling_factor": 0.5,
        "num_train_timesteps": 1000,
        "flip": True,
        "caption_dropout": 0.3,
    }
    return TrainingSet(**(arguments | changed))


def _fill(cache: TensorCache, keys: list[str], embedding_keys: dict[str, str]) -> None:
    """Means are the picture's number, or minus it where mirrored; standard deviations are 2."""
    for number, (key, (width, height)) in enumerate(zip(keys, SIZES, strict=True)):
        mean = torch.full((4, height // 8, width // 8), 100.0 * (number + 1))
        spread = torch.full_like(mean, 2 * torch.log(torch.tensor(2.0)).item())
        moments = {
            name: torch.cat([sign * mean, spread]).half()
            for name, sign in (("moments", 1), ("moments_flipped", -1))
        }
        cache.put(key, moments)
    for number, key in enumerate(embedding_keys.values()):  # "" is number 0
        cache.put(key, {"embeddings": torch.full((5, 3), float(number)).half()})


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


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
def test_every_image_once_per_epoch_in_batches_of_one_size(data, tmp_path, batch_size):
    data = training_set(tmp_path / "cache", batch_size=batch_size)
    plans = [data.epoch_plan(epoch) for epoch in range(4)]
    for plan in plans:
        assert len(plan) == data.batches_per_epoch
        assert sorted(itertools.chain(*plan)) == list(range(len(SIZES)))
        assert all(len({SIZES[index] for index in batch}) == 1 for batch in plan)
        assert max(len(batch) for batch in plan) <= batch_size
    assert len({str(plan) for plan in plans}) > 1
    assert (
        plans[0]
        == data.epoch_plan(0)
        != training_set(tmp_path / "cache", batch_size=batch_size, seed=5).epoch_plan(0)
    )


def test_positions_walk_through_the_epochs(data):
    assert data.batches_per_epoch == 4
    assert [data.position(step) for step in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]
    seen = [name for step in steps(data, 4, 8) for batch in step for name in batch["ids"]]
    assert sorted(seen) == sorted(record.id for record in data.records)


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

    changed = {"embedding_keys": None, "tokenize": tokenize, "caption_dropout": share}
    trained = training_set(tmp_path / "cache", flip=False, **changed)
    samples = [trained.sample(step, 0) for step in range(20)]
    assert seen == captions
    assert all(sample["latents"].mean() > 0 for sample in samples)
    assert "prompt_embeds" not in samples[0]
    (batch,) = trained.share(0, rank=0, world=1, micro_batch_size=8)
    assert batch["input_ids"].shape == (len(batch["ids"]), 2)
    assert batch["timestep"].dtype == torch.int64 and batch["weight"].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_entry_is_one_clear_message(data, workers):
    for key in data.latent_keys:
        data.cache.path(key).write_bytes(b"damaged")
    with pytest.raises(UserError, match="run the command again") as caught:
        steps(data, 0, 2, workers=workers)
    assert "Traceback" not in str(caught.value)


def test_it_travels_to_another_process(data):
    copy = pickle.loads(pickle.dumps(data))
    assert same(copy.sample(3, 4), data.sample(3, 4))
    assert copy.epoch_plan(2) == data.epoch_plan(2)
