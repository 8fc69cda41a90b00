"""train/full.py end to end on a tiny base."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.runs import arguments, make_world
from train import full, models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def weights(folder):
    pipeline = models.load_pipeline(str(folder))
    return {
        part: {name: value.clone() for name, value in getattr(pipeline, part).state_dict().items()}
        for part in ("unet", "text_encoder", "vae")
    }


def moved(before, after):
    """Share of the tensors that differ."""
    return sum(not torch.equal(before[name], after[name]) for name in before) / len(before)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_what_is_asked_for_trains_and_nothing_else(world, tmp_path, text_encoder):
    overrides = [f"full.text_encoder={text_encoder}", "optim.learning_rate=1e-3"]
    arguments_ = [a for a in arguments(world, tmp_path / "run", *overrides)]
    full.main([_without_lora(tmp_path, arguments_[0]), *arguments_[1:]])
    before, after = weights(world / "base"), weights(tmp_path / "run" / "full")
    assert moved(before["unet"], after["unet"]) == 1
    assert moved(before["vae"], after["vae"]) == 0
    assert moved(before["text_encoder"], after["text_encoder"]) == (0 if not text_encoder else 1)


def _without_lora(folder, config):
    """The tiny configuration without its lora section."""
    import yaml

    values = yaml.safe_load(open(config.removeprefix("--config="), encoding="utf-8"))
    del values["lora"]
    (folder / "full.yaml").write_text(yaml.safe_dump(values))
    return f"--config={folder / 'full.yaml'}"


def test_the_result_is_a_whole_pipeline(world, tmp_path):
    tiny = arguments(world, tmp_path / "run", "train.steps=1", "optim.warmup_steps=0")
    full.main([_without_lora(tmp_path, tiny[0]), *tiny[1:]])
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "full")
    picture = pipeline("a star", num_inference_steps=1, width=64, height=64).images[0]
    assert picture.size == (64, 64)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_mixed_precision_does_not_round_what_is_exported(world, tmp_path):
    tiny = arguments(
        world,
        tmp_path / "run",
        "train.mixed_precision=bf16",
        "optim.learning_rate=1e-9",
        "optim.final_learning_rate=0",
        "optim.weight_decay=0",
        "preview.every=0",
    )
    full.main([_without_lora(tmp_path, tiny[0]), *tiny[1:]])
    before, after = weights(world / "base"), weights(tmp_path / "run" / "full")
    for part in before:
        for name, value in before[part].items():
            assert torch.allclose(value, after[part][name], atol=1e-7), name
