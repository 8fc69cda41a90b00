"""The toy world, and the toy models that everything else stands on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import toy
from data.sources import scan

ASSETS = Path(__file__).resolve().parent.parent / "data" / "assets"


def test_a_scene_is_a_function_of_seed_and_index():
    assert toy.sample_scene(1, 5) == toy.sample_scene(1, 5)
    assert len({toy.sample_scene(1, index) for index in range(50)}) == 50
    assert toy.sample_scene(1, 5) != toy.sample_scene(2, 5)


def test_attributes_are_uniform_and_independent():
    scenes = [toy.sample_scene(0, index) for index in range(2400)]
    shapes = Counter(scene.shape for scene in scenes)
    assert set(shapes) == set(toy.SHAPES) and max(shapes.values()) < 1.25 * min(shapes.values())
    pairs = Counter((scene.colour, scene.size) for scene in scenes)
    assert len(pairs) == 24 and min(pairs.values()) > 50


@pytest.mark.parametrize(("width", "height"), toy.ASPECTS)
@pytest.mark.parametrize("style", [None, *toy.STYLES])
def test_pictures_have_their_size_in_every_style(width, height, style):
    scene = toy.sample_scene(0, 3, width=width, height=height)
    picture = toy.render(scene, width, height, style=style)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8


def test_the_shape_is_where_and_how_large_the_scene_says():
    for index in range(40):
        scene = toy.sample_scene(0, index)
        picture = toy.render(scene, 128, 128).astype(int)
        colour = np.array(toy.COLOURS[scene.colour]) + np.array(scene.tint)
        rows, columns = np.nonzero(np.abs(picture - colour).max(2) < 12)
        if scene.colour == "white" and scene.background in ("striped", "checkered"):
            continue
        extent = max(np.ptp(rows), np.ptp(columns)) / 128
        assert 1.5 * scene.radius < extent < 2.4 * scene.radius, scene


def test_styles_and_subjects_change_the_picture_and_not_the_caption():
    scene = toy.sample_scene(0, 1)
    plain = toy.render(scene, 128, 128)
    for style in toy.STYLES:
        styled = toy.render(scene, 128, 128, style=style)
        assert np.abs(styled.astype(int) - plain).mean() > 8, style
    assert toy.caption(scene).count(scene.colour) == 1
    assert toy.caption(scene, name="sks circle") == (
        f"a {scene.size} sks circle on a {scene.background} background"
    )


def test_written_pictures_are_read_back_with_their_captions(tmp_path):
    toy.write_pictures(tmp_path / "world", 4, seed=3, style="glow")
    source = scan(tmp_path / "world")
    assert [(r.width, r.height) for r in source.table] == [
        (128, 128),
        (96, 160),
        (128, 128),
        (160, 96),
    ]
    assert source.table[0].captions == (toy.caption(toy.sample_scene(3, 0)),)


def test_the_toy_models_are_small_enough_for_a_repository():
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert 2**20 < total < 20 * 2**20


def test_the_toy_base_is_shaped_like_sd_2():
    from train.models import load_pipeline

    pipeline = load_pipeline(str(ASSETS / "toy-base"))
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.use_linear_projection
    assert pipeline.tokenizer.pad_token == "!" and pipeline.tokenizer.pad_token_id == 0
    ids = pipeline.tokenizer("a red heart", padding="max_length").input_ids
    assert len(ids) == 77 and ids[-1] == 0
    assert pipeline.vae.config.latent_channels == 4


def test_a_plain_pipeline_takes_the_toy_base_as_it_is():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "toy-base", safety_checker=None)
    picture = pipeline("a red heart", num_inference_steps=1, width=64, height=64).images[0]
    assert picture.size == (64, 64)


def test_the_checker_judges_fresh_renders_rightly():
    from scripts.toy.checker import load_checker
    from scripts.toy.measure import rates

    scenes = [toy.sample_scene(777, index) for index in range(200)]
    pictures = [toy.render(scene, 128, 128) for scene in scenes]
    measured = rates(load_checker(ASSETS / "toy-checker"), pictures, scenes)
    assert all(summary["mean"] >= 0.98 for summary in measured.values()), measured


def test_the_toy_base_follows_prompts(tmp_path):
    from eval.features import read_rgb
    from eval.generation import generate
    from scripts.toy.checker import load_checker
    from scripts.toy.measure import rates
    from train.models import load_pipeline

    scenes = [toy.sample_scene(778, index) for index in range(16)]
    paths = generate(
        load_pipeline(str(ASSETS / "toy-base")),
        [toy.caption(scene) for scene in scenes],
        seeds=range(16),
        steps=15,
        guidance=3.0,
        size=(128, 128),
        batch_size=16,
        folder=tmp_path,
    )
    checker = load_checker(ASSETS / "toy-checker")
    measured = rates(checker, [read_rgb(path) for path in paths], scenes)
    assert min(summary["mean"] for name, summary in measured.items() if name != "all four") > 0.7
