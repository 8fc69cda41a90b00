"""Random masks: what they hide, what of it is cached, and what training sees of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data import inpainting
from data.cache import LatentKeys, cache_latents
from data.inpainting import cache_masked, random_mask, tensor_name
from data.loader import TrainingSet
from data.noising import Noising
from data.order import Order
from data.records import Record
from data.store import TensorStore
from data.wording import Wording
from tests.tiny import tiny_pipeline
from train.config import CaptionConfig, DiffusionConfig, UserError
from train.models import latent_encoder

SIZE = (64, 48)
COUNT = 5


# Masks


def test_a_mask_is_a_function_of_the_picture_and_its_number():
    assert np.array_equal(random_mask(SIZE, "a", 3), random_mask(SIZE, "a", 3))
    masks = {random_mask(SIZE, sha, k).tobytes() for sha in "abcdef" for k in range(8)}
    assert len(masks) == 6 * 6 + 1  # and the whole


def test_a_quarter_of_the_masks_hide_everything_and_of_every_picture_as_many():
    for picture in map(str, range(20)):
        assert sum(random_mask(SIZE, picture, k).all() for k in range(8)) == 2
    first = [random_mask(SIZE, str(k), 0).all() for k in range(400)]
    assert 70 <= sum(first) <= 130


@pytest.mark.parametrize("size", [(64, 64), (8, 64), (768, 512)])
def test_every_mask_hides_some_latent_and_most_leave_most(size):
    masks = [random_mask(size, str(k), 1) for k in range(200)]
    assert all(mask.shape == size[::-1] and mask[::8, ::8].any() for mask in masks)
    if min(size) > 8:
        partial = [mask.mean() for mask in masks if not mask.all()]
        assert 0.1 < np.mean(partial) < 0.5 and max(partial) < 0.95


# The cache


@pytest.fixture
def records(tmp_path):
    """Three pictures of noise, and where they are."""
    from hashlib import sha256

    rng, found = np.random.default_rng(0), []
    for k in range(3):
        file = tmp_path / f"{k}.png"
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file)
        digest = sha256(file.read_bytes()).hexdigest()
        found.append(Record(file.name, f"file:{file}", ("a cat",), *SIZE, digest))
    return found


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(family="sd2-inpainting")


@pytest.fixture
def keys(records):
    return LatentKeys(records, np.array([SIZE] * 3), "vae")


@pytest.fixture
def store(tmp_path):
    return TensorStore(tmp_path / "cache")


def entry(store, keys, index=0):
    store.refresh()
    return store.get(keys.keys(index)[0])


@pytest.mark.parametrize("flipped", [False, True])
def test_what_is_cached_is_what_the_pipeline_makes_of_picture_and_mask(
    records, keys, store, pipeline, flipped
):
    cache_masked(keys, store, latent_encoder(pipeline.vae), count=COUNT, flip=True, batch_size=4)
    image = Image.open(records[0].path)
    for number in range(COUNT):
        found = entry(store, keys)[tensor_name(number, flipped=flipped)].float()
        mask = Image.fromarray(random_mask(SIZE, records[0].sha256, number))
        picture, mask = (
            one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else one
            for one in (image, mask)
        )
        small, posterior = as_diffusers_does(pipeline, picture, mask)
        assert torch.equal(found[:1], small[0])
        torch.testing.assert_close(found[1:], posterior[0], atol=2e-3, rtol=2e-3)


def as_diffusers_does(pipeline, picture, mask):
    """StableDiffusionInpaintPipeline.__call__, steps 5 to 7."""
    size = {"height": SIZE[1], "width": SIZE[0]}
    pixels = pipeline.image_processor.preprocess(picture, **size)
    condition = pipeline.mask_processor.preprocess(mask.convert("L"), **size)
    with torch.no_grad():
        small, _ = pipeline.prepare_mask_latents(
            condition, pixels, 1, *size.values(), torch.float32, "cpu", None, False
        )
        return small, pipeline.vae.encode(pixels * (condition < 0.5)).latent_dist.parameters


def test_only_what_is_missing_is_encoded_and_each_picture_read_once(records, keys, store, pipeline):
    encode, reads = latent_encoder(pipeline.vae), []

    def read(record):
        reads.append(record.id)
        return record.read()

    assert cache_masked(keys, store, encode, count=2, read=read) == 3
    before = entry(store, keys)
    assert cache_masked(keys, store, encode, count=2, read=read) == 0
    assert cache_masked(keys, store, encode, count=COUNT, flip=True, read=read) == 3
    after = entry(store, keys)
    assert len(before) == 2 and len(after) == 2 * COUNT
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(reads) == 2 * len(records)
    # Latents of the whole picture go into the same entry.
    cache_latents(keys, store, encode)
    assert len(entry(store, keys)) == 2 * COUNT + 1


def test_processes_share_the_work_and_make_the_same(keys, store, pipeline, tmp_path):
    encode = latent_encoder(pipeline.vae)
    counts = [cache_masked(keys, store, encode, count=2, rank=rank, world=2) for rank in range(2)]
    alone = TensorStore(tmp_path / "alone")
    cache_masked(keys, alone, encode, count=2)
    assert sorted(counts) == [1, 2]
    for index in range(3):
        one, other = entry(store, keys, index), entry(alone, keys, index)
        assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_latents_that_are_not_finite_name_the_picture(records, keys, store):
    def broken(pixels):
        return torch.full((len(pixels), 8, 6, 8), torch.nan)

    with pytest.raises(UserError, match=r"0.png: its latents are not finite"):
        cache_masked(keys, store, broken, count=1)


def test_a_picture_that_changed_is_not_masked_as_if_it_had_not(records, keys, store, pipeline):
    other = io.BytesIO()
    Image.new("RGB", SIZE).save(other, "PNG")
    with pytest.raises(UserError, match="changed while it was being read"):
        cache_masked(
            keys, store, latent_encoder(pipeline.vae), count=1, read=lambda _: other.getvalue()
        )


# Training


def exact(pixels):
    """Moments that hardly vary: the mean of each place's colours."""
    mean = torch.nn.functional.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]]
    return torch.cat([mean, torch.full_like(mean, -20)], 1)


@pytest.fixture
def filled(keys, store):
    cache_latents(keys, store, exact, flip=True)
    cache_masked(keys, store, exact, count=COUNT, flip=True)
    store.refresh()
    return store


def training_set(records, keys, store, **options):
    return TrainingSet(
        records=records,
        order=Order(keys.sizes, seed=0, batch_size=3),
        wordings=[Wording.of(CaptionConfig())],
        store=store,
        latent_keys=keys,
        seed=0,
        scaling_factor=0.5,
        noising=Noising.of(DiffusionConfig(), 1000),
        tokenize=lambda captions: torch.zeros(len(captions), 77, dtype=torch.int64),
        flip=True,
        **options,
    )


def test_each_sample_gets_one_of_its_masks_mirrored_as_its_picture_is(records, keys, filled):
    masked = training_set(records, keys, filled, random_masks=COUNT)
    seen = set()
    for step in range(60):
        sample = masked.sample(step, 0)
        assert sample["inpaint_mask"].shape == (1, 6, 8)
        tensors = {name: tensor.float() for name, tensor in entry(filled, keys).items()}
        flipped = close(sample["latents"], tensors["moments_flipped"])
        assert flipped != close(sample["latents"], tensors["moments"])
        found = [
            number
            for number in range(COUNT)
            if torch.equal(
                tensors[tensor_name(number, flipped=flipped)][:1], sample["inpaint_mask"]
            )
            and close(sample["masked_latents"], tensors[tensor_name(number, flipped=flipped)][1:])
        ]
        assert found
        seen.add((found[0], flipped))
    numbers = {number for number, _ in seen}
    assert len(numbers) >= COUNT - 1 and len(seen) > len(numbers)


def close(latents, moments):
    """Whether they are these moments' mean, scaled."""
    return torch.allclose(latents, 0.5 * moments[:4], atol=1e-3)


def test_masks_change_nothing_else_of_a_sample(records, keys, filled):
    masked = training_set(records, keys, filled, random_masks=COUNT)
    plain = training_set(records, keys, filled)
    for step in range(5):
        one, other = masked.sample(step, 1), plain.sample(step, 1)
        assert one.keys() - other.keys() == {"inpaint_mask", "masked_latents"}
        for name in other:
            assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))


def test_a_mask_that_the_cache_lost_is_told(records, keys, filled):
    found = training_set(records, keys, filled, random_masks=COUNT + 20)
    with pytest.raises(UserError, match="has lost what was made of"):
        for step in range(40):
            found.sample(step, 0)


def test_the_version_is_in_the_name():
    assert tensor_name(3, flipped=True).startswith(f"inpainting{inpainting.VERSION}-3")
    assert tensor_name(3, flipped=True) != tensor_name(3, flipped=False)
