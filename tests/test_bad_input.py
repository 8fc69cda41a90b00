"""A mistake is one message naming it and the remedy, exit code 2, before anything heavy."""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.runs import ROOT, arguments, make_world
from tests.tiny import tiny_clip
from train import lora
from train.config import UserError

DOG = ("evaluation.subject=zwx dog", "evaluation.noun=dog")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), pictures=3)


def run(*args, entry="train/lora.py"):
    return subprocess.run(
        [sys.executable, str(ROOT / entry), *args], capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """A run whose pictures are scored every second step of six."""
    clip = tiny_clip(tmp_path_factory.mktemp("clip") / "clip", dimension=60)
    return (
        "evaluation.every=2",
        f"evaluation.path={world / 'pictures'}",
        f"evaluation.clip={clip}",
        "evaluation.quick_images=8",
        "validation.every=0",
    )


def complaint(world, tmp_path, *overrides):
    with pytest.raises(UserError) as caught:
        lora.main(arguments(world, tmp_path / "run", "dry_run=true", *overrides))
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_a_mistake_is_one_line_and_exit_code_2(world, tmp_path):
    result = run(*arguments(world, tmp_path / "run", "lora.rnak=8"))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert "lora.rnak" in result.stderr and "did you mean 'lora.rank'" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_valid_dry_run_says_the_plan_and_writes_nothing(world, tmp_path):
    result = run(*arguments(world, tmp_path / "run", "dry_run=true"))
    assert result.returncode == 0, result.stderr
    assert "3 pictures" in result.stdout and "nothing trained" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset_is_named(world, tmp_path):
    assert "/nowhere" in complaint(world, tmp_path, "data.path=/nowhere")


def test_an_empty_dataset_is_named(world, tmp_path):
    (tmp_path / "empty").mkdir()
    message = complaint(world, tmp_path, f"data.path={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in message


def test_an_unreadable_picture_is_named(world, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (folder / "broken.txt").write_text("a picture")
    assert "broken.png" in complaint(world, tmp_path, f"data.path={folder}")


def test_a_missing_model_part_is_named(world, tmp_path):
    base = tmp_path / "base"
    os.symlink(world / "base", base)
    partial = tmp_path / "partial"
    partial.mkdir()
    for part in (world / "base").iterdir():
        if part.name != "vae":
            os.symlink(part, partial / part.name)
    assert "lacks vae" in complaint(world, tmp_path, f"model.path={partial}")


def test_another_family_is_named(world, tmp_path):
    base = _copy_with_unet(world, tmp_path, addition_embed_type="text_time")
    assert "is Stable Diffusion XL" in complaint(world, tmp_path, f"model.path={base}")


def _copy_with_unet(world, tmp_path, **changes):
    base = tmp_path / "other"
    (base / "unet").mkdir(parents=True)
    for part in (world / "base").iterdir():
        if part.name != "unet":
            os.symlink(part, base / part.name)
    config = json.loads((world / "base" / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | changes))
    weights = "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(world / "base" / weights), base / weights)
    return base


def test_no_space_is_said_before_anything_is_written(world, tmp_path, monkeypatch):
    from train import rundir

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda path: usage)
    message = complaint(world, tmp_path)
    assert "not enough space" in message and "free" in message


def test_a_pickled_model_is_refused(world, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    assert "safetensors" in complaint(world, tmp_path, f"model.path={tmp_path / 'model.ckpt'}")


def test_a_run_directory_that_cannot_be_written_is_named(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output=.*file"):
        lora.main(arguments(world, tmp_path / "file"))


@pytest.mark.parametrize("entry", ["train/lora.py", "train/full.py", "eval/evaluate.py"])
def test_help_needs_no_heavy_import(entry):
    code = (
        "import sys, runpy; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / entry)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "learning_rate" in result.stdout or "evaluation." in result.stdout


def test_validation_needs_no_heavy_import(world, scored, tmp_path):
    code = (
        "import sys; from train.lora import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    dry = arguments(world, tmp_path / "run", "dry_run=true", *scored)
    result = subprocess.run(
        [sys.executable, "-c", code, *dry], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


def test_a_missing_held_out_folder_is_found_in_the_plan(world, tmp_path):
    assert "evaluation.path=/nowhere" in complaint(world, tmp_path, "evaluation.path=/nowhere")


def test_a_plan_says_what_is_scored_how_often_and_how_surely(world, scored, tmp_path, capsys):
    values = arguments(world, tmp_path / "run", "dry_run=true", *scored)
    lora.main([*values, "validation.metric=fid", "train.steps=7"])
    said = capsys.readouterr().out
    assert (
        "scores   8 pictures of 25 sampling steps against 3 real ones, every 2 steps, 5 times: "
        "kid, cmmd, fid, clip_score\n"
    ) in said
    assert "\nnote     FID is measured on 8 and 3 pictures in 60 dimensions" in said
    lora.main([*values, "validation.metric=kid"])
    assert "validation.metric=kid of 8 pictures against 3" in capsys.readouterr().out
    lora.main([*values, "validation.metric=clip_score"])
    assert "note" not in capsys.readouterr().out
    lora.main(arguments(world, tmp_path / "run", "dry_run=true"))
    assert "scores" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["evaluation.clip=/nope"], "/nope"),
        (["evaluation.dino=/nope"], "/nope"),
        (["evaluation.features=/nope.pt"], "/nope.pt"),
        (["evaluation.path=null"], "evaluation.path is not set"),
        (["evaluation.protocol=objcts", *DOG], "evaluation.protocol=objcts.*mean objects"),
        (["evaluation.protocol=objects"], "evaluation.subject=.*evaluation.noun="),
        (["validation.metric=clip_i"], "=clip_i needs evaluation.subject=.*kid, cmmd, fid, clip"),
        (["validation.metric=clip_t"], "=clip_t needs evaluation.subject="),
        (
            ["validation.metric=fid", "evaluation.protocol=objects", *DOG],
            "=fid needs evaluation.protocol=held_out and evaluation.path=.* clip_i, clip_t, clip_",
        ),
        (
            [
                "validation.metric=clip_i",
                "evaluation.protocol=objects",
                "evaluation.path=null",
                "evaluation.training_images=0",
                *DOG,
            ],
            "=clip_i needs evaluation.path=",
        ),
    ],
)
def test_a_mistake_in_the_evaluation_is_found_in_the_plan(
    world, scored, tmp_path, mistake, message
):
    said = complaint(world, tmp_path, *scored, *mistake)
    assert re.search(message, said) and "\n" not in said


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_run_is_not_written_among_its_pictures(world, tmp_path, inside):
    output = world / "pictures" / inside
    with pytest.raises(UserError, match="would be taken for pictures"):
        lora.main([*arguments(world, output), "dry_run=true"])


def test_a_dry_run_names_long_captions_and_what_crops_lack(world, tmp_path, capsys):
    words = "data.captions.suffix= and so on" + " and on" * 80
    lora.main([*arguments(world, tmp_path / "run", words, "data.crop=focus"), "dry_run=true"])
    said = capsys.readouterr().out
    assert "captions of more than 75 words" in said and "no picture has a focus point" in said


def test_a_refused_run_has_written_nothing_among_the_pictures(world, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (world / "pictures").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "bad.png").write_bytes(b"hello")
    before = sorted(path.name for path in folder.rglob("*"))
    values = arguments(world, folder / "run", "data.on_bad_image=quarantine")
    with pytest.raises(UserError, match="would be taken for pictures"):
        lora.main([*values, f"data.path={folder}"])
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_run_that_is_refused_leaves_nothing_behind(world, tmp_path):
    for mistake in ("data.path=/nowhere", "lora.start_from=/nowhere", "evaluation.path=/nowhere"):
        with pytest.raises(UserError, match="/nowhere"):
            lora.main(arguments(world, tmp_path / "runs/new", mistake))
        assert not list(tmp_path.iterdir())


def test_the_output_of_prepare_is_not_taken_for_pictures(world, tmp_path):
    prepared = tmp_path / "prepared"
    (prepared / "train").mkdir(parents=True)
    (prepared / "prepared.json").write_text("{}")
    said = complaint(world, tmp_path, f"data.path={prepared}")
    assert f"data.path={prepared / 'train'}" in said
