import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from eval.features import find_extractor, load_extractor, squash
from tests.tiny import tiny_clip
from train.config import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def extractor(folder):
    return load_extractor(folder)


def _pictures(count: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (96, 160), (160, 96), (20, 44), (32, 32)]
    return [rng.integers(0, 256, (*sizes[k % 5], 3), dtype=np.uint8) for k in range(count)]


def test_a_picture_of_clips_size_gets_clips_own_embedding(folder, extractor):
    picture = _pictures(1)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder).get_image_features(**pixels).pooler_output
    got = extractor.images(picture)
    assert got.shape == (1, 16) and got.dtype == np.float64
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_result_is_deterministic_and_independent_of_the_batch(extractor):
    pictures = _pictures()
    whole = extractor.images(pictures)
    assert (whole == extractor.images(pictures)).all()
    np.testing.assert_allclose(whole, extractor.images(pictures, batch_size=2), atol=1e-5)
    np.testing.assert_allclose(whole[1:2], extractor.images([pictures[1]]), atol=1e-5)
    texts = ["a", "a longer text", "b"]
    one_by_one = [extractor.texts([text])[0] for text in texts]
    np.testing.assert_allclose(extractor.texts(texts), one_by_one, atol=1e-5)


def test_files_and_arrays_are_alike_and_may_come_one_by_one(extractor, tmp_path):
    pictures = _pictures(3)
    for k, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    files = (tmp_path / f"{k}.png" for k in range(3))
    assert (extractor.images(files) == extractor.images(pictures)).all()


def test_the_ends_of_a_wide_picture_are_seen(extractor):
    wide = np.full((32, 96, 3), 128, np.uint8)
    marked = wide.copy()
    marked[:, :16] = 255
    assert np.abs(extractor.images([wide]) - extractor.images([marked])).max() > 1e-3


def test_squash_is_antialiased_and_keeps_the_mean():
    checker = (np.indices((64, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = squash(np.stack([checker] * 3, axis=-1), 16)
    assert small.shape == (16, 16, 3) and small.dtype == np.float32
    np.testing.assert_allclose(small, 127.5, atol=2)


def test_long_texts_are_cut_and_counted(extractor):
    texts = ["short", "x " * 200]
    assert extractor.texts(texts).shape == (2, 16)
    assert extractor.count_cut(texts) == 1


def test_fingerprint_is_that_of_the_file(folder, extractor):
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert extractor.describe()["sha256"] == expected
    assert extractor.resize == "clean bicubic, squashed to 32x32"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "lacks preprocessor_config.json"),
        ("model.safetensors", "no .safetensors weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused_by_name(folder, tmp_path, missing, message):
    copy = shutil.copytree(folder, tmp_path / "clip")
    (copy / missing).unlink()
    with pytest.raises(UserError, match=message):
        find_extractor(copy)


def test_what_is_no_clip_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no CLIP folder at ./gone"):
        find_extractor("./gone")
    copy = shutil.copytree(folder, tmp_path / "clip")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="type 'bert'"):
        find_extractor(copy)
