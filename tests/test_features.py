import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from eval import networks
from eval.features import find_clip, find_extractor, load_clip, load_extractor, read_rgb
from tests.tiny import tiny_clip
from train.config import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def extractor(folder):
    return load_clip(folder)


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


def _in_threes(embed, items):
    return np.concatenate([embed(items[start : start + 3]) for start in range(0, len(items), 3)])


@pytest.mark.parametrize("clip", ["tiny", "data/assets/toy-clip"])
def test_a_row_has_the_same_bits_whatever_else_is_embedded(clip, extractor):
    one = extractor if clip == "tiny" else load_clip(clip)
    order = np.random.default_rng(1).permutation(8)
    texts = ["a", "a longer text", "b", "a red circle", "c", "d", "x " * 90, "e"]
    for embed, items in ((one.images, _pictures(8)), (one.texts, texts)):
        whole = embed(items)
        assert (whole == _in_threes(embed, items)).all()
        assert (whole == np.concatenate([embed([item]) for item in items])).all()
        assert (whole[order] == embed([items[k] for k in order])).all()


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(extractor):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(extractor.images(_pictures()))
            assert torch.get_num_threads() == threads == _of_a_new_thread()
    finally:
        torch.set_num_threads(before)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def _of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_training_settings_of_precision_change_no_bit(extractor):
    plain, texts = extractor.images(_pictures()), extractor.texts(["a", "b"])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (extractor.images(_pictures()) == plain).all()
            assert (extractor.texts(["a", "b"]) == texts).all()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8])
def test_batches_of_an_accelerator_have_one_size_and_no_duplicates_remain(count):
    sizes = []

    def embed(batch):
        sizes.append(len(batch))
        assert not torch.is_autocast_enabled("cpu") and torch.is_inference_mode_enabled()
        return 2 * batch

    items = [np.float32([k, -k]) for k in range(count)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = list(networks._in_batches(items, np.asarray, embed, torch.device("cpu"), 4))
    assert [row.tolist() for row in rows] == [[2 * k, -2 * k] for k in range(count)]
    assert sizes == [4] * -(-count // 4)


def test_files_and_arrays_are_alike_and_may_come_one_by_one(extractor, tmp_path):
    pictures = _pictures(3)
    for k, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    files = (tmp_path / f"{k}.png" for k in range(3))
    assert (extractor.images(files) == extractor.images(pictures)).all()
    assert extractor.images([]).shape == extractor.texts([]).shape == (0, 16)


def test_a_file_is_read_upright_and_over_white(tmp_path):
    pixels = _pictures(4)[3]  # 20 x 44
    sideways = Image.Exif()
    sideways[0x0112] = 6  # turned by 90 degrees clockwise to be upright
    Image.fromarray(pixels).save(tmp_path / "sideways.png", exif=sideways)
    assert (read_rgb(tmp_path / "sideways.png") == np.rot90(pixels, k=-1)).all()
    clear = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_rgb(str(tmp_path / "clear.png")) == 255).all()


def test_a_picture_that_cannot_be_read_is_named(extractor, tmp_path):
    file = tmp_path / "torn.png"
    Image.fromarray(_pictures(1)[0]).save(file)
    file.write_bytes(file.read_bytes()[:400])
    for bad in (file, tmp_path / "gone.png"):
        with pytest.raises(UserError, match=f"{bad.name} .*take it out"):
            extractor.images([*_pictures(2), bad])


def test_the_ends_of_a_wide_picture_are_seen(extractor):
    wide = np.full((32, 96, 3), 128, np.uint8)
    marked = wide.copy()
    marked[:, :16] = 255
    assert np.abs(extractor.images([wide]) - extractor.images([marked])).max() > 1e-3


def test_long_texts_are_cut_and_counted(extractor):
    texts = ["short", "x " * 200]
    assert extractor.texts(texts).shape == (2, 16)
    assert extractor.count_cut(texts) == 1 and extractor.count_cut([]) == 0


def test_it_says_what_must_agree_and_a_path_does_not_matter(folder, extractor, tmp_path):
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    said = extractor.describe()
    assert said["sha256"] == expected and said["dimension"] == 16
    assert said["resize"] == "clean bicubic, squashed to 32x32"
    copy = load_extractor(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.describe() == said | {"name": str(tmp_path / "copy")}
    assert copy.cache_key == extractor.cache_key


def test_what_changes_features_changes_the_key_of_the_cache(folder, extractor, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert load_extractor(copy, resize="legacy_tf").cache_key != extractor.cache_key
    for file, key, value in (
        ("preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5]),
        ("config.json", "vision_config", {"hidden_act": "gelu"}),
    ):
        copy = shutil.copytree(folder, tmp_path / key)
        content = json.loads((copy / file).read_text())
        content[key] = content[key] | value if isinstance(value, dict) else value
        (copy / file).write_text(json.dumps(content))
        other = load_extractor(copy)
        assert other.fingerprint == extractor.fingerprint
        assert other.cache_key != extractor.cache_key
        assert (other.images(_pictures(1)) != extractor.images(_pictures(1))).any()


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


def test_weights_in_several_files_are_one_model_and_all_must_be_there(folder, extractor, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "clip")
    CLIPModel.from_pretrained(folder).save_pretrained(copy, max_shard_size="40KB")
    (copy / "model.safetensors").unlink(missing_ok=True)
    parts = sorted(copy.glob("model-*.safetensors"))
    assert len(parts) > 1
    other = load_extractor(copy)
    assert (other.images(_pictures(1)) == extractor.images(_pictures(1))).all()
    assert other.fingerprint == hashlib.sha256(b"".join(map(_bytes, parts))).hexdigest()
    parts[1].unlink()
    with pytest.raises(UserError, match=f"lacks {parts[1].name} of its weights"):
        find_extractor(copy)


def _bytes(path) -> bytes:
    return path.read_bytes()


def test_damaged_or_other_weights_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "clip")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="weights in .* cannot be loaded") as said:
        load_extractor(copy)
    assert "\n" not in str(said.value)
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(copy)
    shutil.copy(folder / "config.json", copy)
    with pytest.raises(UserError, match="weights in .* lack .* of the CLIPModel's"):
        load_extractor(copy)


def test_what_is_no_extractor_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no CLIP folder at ./gone"):
        find_extractor("./gone")
    copy = shutil.copytree(folder, tmp_path / "clip")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="type 'bert'"):
        find_extractor(copy)
    (copy / "config.json").write_text("not json")
    with pytest.raises(UserError, match="config.json is not the JSON"):
        find_extractor(copy)
    (copy / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(UserError, match="embeds pictures, but not texts"):
        find_clip(copy)
    with pytest.raises(UserError, match="resize=lanczos is not known: give clean or legacy_tf"):
        load_extractor(folder, resize="lanczos")
