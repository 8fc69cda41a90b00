"""The judge of pictures that are made during training: what it looks at, and how often."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from eval import embedded, in_training
from eval.in_training import few, prepare
from tests.runs import arguments, make_world
from tests.tiny import tiny_clip, tiny_pipeline
from train import lora, pictures
from train.config import LoraRun, load

DOG = ("evaluation.protocol=objects", "evaluation.subject=zwx dog", "evaluation.noun=dog")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"), pictures=5)
    tiny_clip(folder / "clip", dimension=4)
    return folder


def config(world, output, *more):
    usual = [
        "evaluation.every=2",
        f"evaluation.clip={world / 'clip'}",
        "evaluation.quick_images=4",
        "evaluation.steps=1",
        "evaluation.guidance=1",
        "validation.every=0",
    ]
    return load(LoraRun, arguments(world, output, *usual, *more))


def prepared(world, output, *more):
    settings = config(world, output, *more)
    return prepare(settings, pictures.find(settings.data))


def held_out(world):
    return f"evaluation.path={world / 'pictures'}"


def test_pictures_trained_on_are_looked_at_only_as_a_subject_s_only_ones(world, tmp_path):
    def training(*more):
        return [one.id for one in prepared(world, tmp_path, *more).given.training]

    assert training(held_out(world)) == training(*DOG, held_out(world)) == []
    assert len(training(*DOG)) == 5
    assert len(training(*DOG, "evaluation.training_images=2")) == 2
    assert prepared(world, tmp_path, *DOG).counts == {
        "pictures": 4,
        "reference": 5,
        "dimension": 4,
    }


@pytest.mark.parametrize(
    ("more", "scores"),
    [
        ((), {"kid", "cmmd", "fid", "clip_score"}),
        (DOG, {"clip_i", "clip_t", "clip_score"}),
    ],
)
def test_the_scores_are_those_that_were_promised_and_real_pictures_are_read_once(
    world, tmp_path, monkeypatch, more, scores
):
    scoring = prepared(world, tmp_path, held_out(world), *more)
    judge = in_training.judge(scoring, Accelerator(cpu=True))
    read, fitted = [], embedded.fitted
    monkeypatch.setattr(
        embedded, "fitted", lambda record, sizes: read.append(record.id) or fitted(record, sizes)
    )
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
    first = judge(pipeline, folder=tmp_path / "first")
    assert first.keys() == scores == scoring.better.keys()
    assert all(np.isfinite(value) for value in first.values())
    assert set(read) == {one.id for one in scoring.given.held_out}
    read.clear()
    assert judge(pipeline, folder=tmp_path / "again") == first and not read


def test_a_run_is_scored_and_says_of_how_many_pictures(world, tmp_path):
    usual = arguments(world, tmp_path / "run", held_out(world))
    lora.main(
        [
            *usual,
            "train.steps=2",
            "optim.warmup_steps=0",
            "evaluation.every=1",
            f"evaluation.clip={world / 'clip'}",
            "evaluation.quick_images=3",
            "evaluation.steps=1",
            "validation.every=0",
            "validation.metric=kid",
            "preview.every=0",
        ]
    )
    steps = sorted((tmp_path / "run/eval/steps").glob("*.json"))
    found = [json.loads(path.read_text()) for path in steps]
    assert [one["step"] for one in found] == [0, 1, 2]
    assert {(one["pictures"], one["reference"], one["dimension"]) for one in found} == {(3, 5, 4)}
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert best["value"] == min(one["metrics"]["kid"] for one in found[1:])
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "validation.metric=kid of 3 pictures against 5 real ones is mostly chance" in page


def test_few_pictures_are_warned_of_where_they_choose():
    counts = {"pictures": 60, "reference": 49, "dimension": 64}
    assert "is mostly chance" in few("kid", counts) and "49 pictures in 64" in few("fid", counts)
    enough = {"pictures": 64, "reference": 64, "dimension": 64}
    for metric in ("kid", "fid", "clip_score", "loss"):
        assert few(metric, enough) is None
        assert few(metric, {}) is None
    assert few("clip_i", counts) is few(None, counts) is None


@pytest.mark.parametrize(
    ("content", "dimension"),
    [
        ({"model_type": "clip", "text_config": {}}, 512),
        ({"model_type": "clip", "text_config": {}, "projection_dim": 768}, 768),
        ({"model_type": "vit"}, 768),
        ({"model_type": "dinov2", "hidden_size": 384}, 384),
    ],
)
def test_the_dimension_is_known_from_a_configuration(
    world, tmp_path, monkeypatch, content, dimension
):
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr("eval.features.find_extractor", Path)
    settings = config(world, tmp_path / "run", f"evaluation.features={tmp_path}")
    assert in_training._dimension(settings) == dimension
