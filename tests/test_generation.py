import numpy as np
import pytest
from PIL import Image

from eval import generation
from eval.features import read_rgb
from eval.generation import generate, read_settings, to_uint8
from tests.tiny import tiny_pipeline

PROMPTS = ["a red cat", "a dog", "a big house", "a tree", "a car"]
SEEDS = [3, 1, 4, 1, 5]
HOW = {"steps": 2, "guidance": 3.0, "size": (64, 64), "batch_size": 2}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def _make(pipeline, folder, prompts=PROMPTS, seeds=SEEDS, **changes):
    return generate(pipeline, prompts, seeds=seeds, folder=folder, **(HOW | changes))


def _pixels(paths):
    return [read_rgb(path).astype(int) for path in paths]


def _close(a, b):
    return all(np.abs(x - y).max() <= 1 for x, y in zip(a, b, strict=True))


def test_a_picture_does_not_depend_on_its_batch(pipeline, tmp_path):
    alone = _pixels(_make(pipeline, tmp_path / "alone", batch_size=1))
    assert _close(alone, _pixels(_make(pipeline, tmp_path / "all", batch_size=5)))


def test_a_picture_has_the_same_bits_in_any_process_and_made_again(pipeline, tmp_path):
    sizes = [(64, 64), (64, 32), (64, 64), (64, 64), (64, 32)]
    once = [path.read_bytes() for path in _make(pipeline, tmp_path / "one", size=sizes)]
    for rank in (1, 0):
        paths = _make(pipeline, tmp_path / "two", size=sizes, rank=rank, world=2)
        made = sorted(path.name for path in (tmp_path / "two").iterdir())
        assert rank == 0 or made == ["00000.png", "00002.png"]
    assert [path.read_bytes() for path in paths] == once
    paths[2].unlink()
    again = _make(pipeline, tmp_path / "two", size=sizes)
    assert [path.read_bytes() for path in again] == once


def test_seed_and_prompt_steer_and_order_is_kept(pipeline, tmp_path):
    first = _pixels(_make(pipeline, tmp_path / "a", ["x", "x", "y"], [1, 2, 1]))
    assert not (first[0] == first[1]).all() and not (first[0] == first[2]).all()
    swapped = _pixels(_make(pipeline, tmp_path / "b", ["y", "x", "x"], [1, 2, 1]))
    assert _close(first, [swapped[2], swapped[1], swapped[0]])


def test_each_picture_may_have_its_size(pipeline, tmp_path):
    sizes = [(64, 64), (64, 32), (32, 64), (64, 32), (64, 64)]
    paths = _make(pipeline, tmp_path, size=sizes)
    assert [Image.open(path).size for path in paths] == sizes


def test_only_what_is_missing_or_made_otherwise_is_made_again(pipeline, tmp_path, monkeypatch):
    paths = _make(pipeline, tmp_path, batch_size=1)
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-400])
    seen = []
    sample = generation._sample
    monkeypatch.setattr(
        generation, "_sample", lambda p, batch: seen.extend(batch) or sample(p, batch)
    )
    _make(pipeline, tmp_path, batch_size=1)
    assert [item["prompt"] for item in seen] == PROMPTS[1:3]
    seen.clear()
    _make(pipeline, tmp_path)
    assert not seen
    for change in ({"guidance": 4.0}, {"steps": 3}, {"size": (32, 64)}):
        _make(pipeline, tmp_path, **change)
        assert len(seen) == 5
        seen.clear()
    assert not list(tmp_path.glob(".*"))


def test_other_weights_are_noticed(tmp_path):
    pipeline = tiny_pipeline()
    before = generation.weights(pipeline)
    parameter = next(pipeline.unet.parameters())
    parameter.data.view(-1)[0] += 1e-4
    assert generation.weights(pipeline) != before


def test_adapter_scale_is_noticed():
    from peft import LoraConfig

    pipeline = tiny_pipeline()
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, adapter_name="style")
    pipeline.set_adapters(["style"], [1.0])
    full = generation.weights(pipeline)
    pipeline.set_adapters(["style"], [0.5])
    half = generation.weights(pipeline)
    pipeline.disable_lora()
    assert len({str(w) for w in (full, half, generation.weights(pipeline))}) == 3


def test_settings_stand_in_the_file_and_names_come_from_the_index(pipeline, tmp_path):
    paths = _make(pipeline, tmp_path, ["../../evil\n<b>"], [7])
    assert paths == [tmp_path / "00000.png"]
    settings = read_settings(paths[0])
    assert settings["prompt"] == "../../evil\n<b>" and settings["seed"] == 7
    assert settings["scheduler"]["prediction_type"] == "v_prediction"


def test_values_are_rounded_not_floored():
    values = np.array([-0.1, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.2])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]


def test_pictures_that_are_not_finite_stop_the_run(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.vae.decoder.conv_out.bias.data[:] = float("nan")
    with pytest.raises(FloatingPointError, match="mixed_precision"):
        _make(pipeline, tmp_path)
