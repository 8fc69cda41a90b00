"""scripts/export.py, from what a run leaves to what other programs read."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts import export
from scripts.exporting import formats, placing
from tests.hub_stand_in import TOKEN, running
from tests.runs import arguments, drawn, make_world
from train import lora
from train.config import ROOT, UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished LoRA run, of UNet and text encoder, whose base lies in `world`."""
    output = tmp_path_factory.mktemp("runs") / "owls"
    more = ("lora.text_encoder.rank=2", "optim.learning_rate=0.05")
    lora.main(arguments(world, output, *more))
    return output


def pictures(folder, adapter=None):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    if adapter:
        pipeline.load_lora_weights(str(adapter.parent), weight_name=adapter.name)
    return drawn(pipeline, "a large red circle", 3, "np")


PICTURES = [f"owls-images/{number:02d}{which}.png" for number in (0, 1) for which in ("", "-base")]


def exported(run, tmp_path, *arguments, name):
    output = tmp_path / name
    export.main([f"run={run}", f"output={output}", *arguments])
    return output


def test_kohyas_file_draws_what_the_adapter_draws(run, world, tmp_path):
    file = exported(run, tmp_path, "format=kohya", name="owls.safetensors")
    ours = pictures(world / "base", run / "adapter" / "pytorch_lora_weights.safetensors")
    base, theirs = pictures(world / "base"), pictures(world / "base", file)
    assert np.abs(ours - theirs).max() <= 1 / 255 < np.abs(ours - base).max()
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        assert all(name.startswith(("lora_unet_", "lora_te_")) for name in opened.keys())
    assert about["ss_output_name"] == "owls" and about["ss_v2"] == "True"


def test_a_merged_folder_and_a_single_file_draw_it_too(run, world, tmp_path):
    from diffusers import StableDiffusionPipeline

    ours = pictures(world / "base", run / "adapter" / "pytorch_lora_weights.safetensors")
    folder = exported(run, tmp_path, "format=merged", name="merged")
    assert np.abs(ours - pictures(folder)).max() <= 2 / 255
    file = exported(run, tmp_path, "format=single_file", name="merged.safetensors")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file), config=str(world / "base"), safety_checker=None
    )
    assert np.abs(ours - drawn(pipeline, "a large red circle", 3, "np")).max() <= 2 / 255


def test_what_a_single_file_predicts_lies_beside_it(run, tmp_path):
    file = exported(run, tmp_path, "format=single_file", "card=false", name="merged.safetensors")
    beside = yaml.safe_load(file.with_suffix(".yaml").read_text())
    assert beside["model"]["params"]["parameterization"] == "v"
    assert {p.name for p in tmp_path.iterdir()} == {"merged.safetensors", "merged.yaml"}


@pytest.fixture
def whole(run, world, tmp_path):
    """A run of train/full.py, as far as an export looks."""
    folder = tmp_path / "whole"
    folder.mkdir()
    shutil.copy(run / "config.yaml", folder)
    shutil.copytree(world / "base", folder / "full")
    return folder


@pytest.mark.parametrize("format", ["diffusers", "merged"])
def test_a_whole_model_is_copied_or_narrowed(whole, world, tmp_path, format):
    assert np.array_equal(
        pictures(world / "base"), pictures(exported(whole, tmp_path, f"format={format}", name="a"))
    )
    half = exported(whole, tmp_path, f"format={format}", "precision=fp16", name="half")
    weights = load_file(half / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_a_whole_model_is_no_adapter(whole, tmp_path):
    with pytest.raises(UserError, match="is a whole model.*format=single_file"):
        exported(whole, tmp_path, "format=kohya", name="a.safetensors")
    with pytest.raises(UserError, match=r"scale=0\.5"):
        exported(whole, tmp_path, "format=merged", "scale=0.5", name="a")


def test_new_words_become_an_embedding_of_web_uis(tmp_path):
    word = tmp_path / "learned_embeds.safetensors"
    save_file({"<owl>": torch.randn(2, 32)}, word)
    output = tmp_path / "owl.safetensors"
    export.main([f"adapter={word}", "format=kohya", f"output={output}"])
    assert torch.equal(load_file(output)["emb_params"], load_file(word)["<owl>"])
    assert "embedding:owl" in output.with_suffix(".md").read_text()
    folder = tmp_path / "out"
    export.main([f"adapter={word}", f"output={folder}"])
    assert torch.equal(load_file(folder / word.name)["<owl>"], load_file(word)["<owl>"])
    back = tmp_path / "back"
    export.main([f"adapter={output}", f"output={back}"])
    (file,) = back.glob("learned_embeds*.safetensors")
    assert torch.equal(load_file(file)["owl"], load_file(word)["<owl>"])
    assert f'weight_name="{file.name}"' in (back / "README.md").read_text()


def test_an_embedding_that_does_not_fit_its_precision_is_told(tmp_path):
    word = tmp_path / "learned_embeds.safetensors"
    save_file({"<owl>": torch.full((2, 32), 1e6)}, word)
    with pytest.raises(UserError, match="<owl> is not finite in torch.float16; use precision=fp32"):
        export.main([f"adapter={word}", "precision=fp16", f"output={tmp_path / 'out'}"])


def test_a_card_of_a_merged_export_is_that_of_a_model(run, tmp_path):
    folder = exported(run, tmp_path, "format=merged", "scale=0.5", name="merged")
    card = (folder / "README.md").read_text()
    assert "A whole model: a LoRA adapter in the weights of `base`, at scale 0.5" in card
    assert "lora" not in yaml.safe_load(card.split("---\n")[1])["tags"]
    assert str(run.parent) not in card


def test_a_scale_is_given_as_scale(run):
    with pytest.raises(UserError, match=r"give its scale as scale=0\.25"):
        export.main([f"adapter={run / 'adapter'}:0.25", "output=x"])


def test_the_run_may_be_where_one_stands(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "my owls")
    monkeypatch.chdir(copy)
    export.main(["run=.", "format=kohya"])
    assert (copy / "export" / "my owls.safetensors").exists()
    assert "# my owls" in (copy / "export" / "my owls.md").read_text()


def test_a_scale_of_0_is_the_base(run, world, tmp_path):
    folder = exported(run, tmp_path, "format=merged", "scale=0", name="merged")
    assert np.array_equal(pictures(world / "base"), pictures(folder))


def test_the_diffusers_format_is_what_the_run_wrote_or_narrower(run, world, tmp_path):
    name = "pytorch_lora_weights.safetensors"
    same = exported(run, tmp_path, name="same")
    half = exported(run, tmp_path, "precision=fp16", name="half")
    its, wide, narrow = (load_file(folder / name) for folder in (run / "adapter", same, half))
    assert its.keys() == wide.keys() == narrow.keys()
    for key, value in its.items():
        assert torch.equal(value, wide[key]) and torch.equal(value.half(), narrow[key])
    ours, again = (pictures(world / "base", folder / name) for folder in (run / "adapter", same))
    assert np.array_equal(ours, again)


def test_the_card_tells_what_there_is_to_know(run, tmp_path):
    folder = exported(run, tmp_path, name="owls")
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "diffusers" and "lora" in about["tags"]
    for shown in about["widget"]:
        with Image.open(folder / shown["output"]["url"]) as picture:
            assert picture.size == (64, 64)
    assert about["widget"][0]["text"] == "a large red circle"
    for said in (
        "# owls",
        "9 pictures",
        "| train.steps | 6 |",
        "load_lora_weights",
        "6 of 6",
    ):
        assert said in body


def test_beside_a_file_lie_its_card_and_the_picture_that_web_uis_show(run, tmp_path, capsys):
    file = exported(run, tmp_path, "format=kohya", name="owls.safetensors")
    said = capsys.readouterr().out
    assert f"wrote {file}, and beside it owls-images, owls.md, owls.png" in said
    card = file.with_suffix(".md").read_text()
    assert "<lora:owls:1>" in card and "(owls-images/00.png)" in card
    for picture in (file.with_suffix(".png"), tmp_path / "owls-images" / "00-base.png"):
        with Image.open(picture) as opened:
            assert opened.size == (64, 64)
    alone = exported(run, tmp_path, "format=kohya", "card=false", name="alone.safetensors")
    assert {p.name for p in tmp_path.glob("alone*")} == {alone.name}


def test_the_scores_of_an_evaluation_are_on_the_card_with_their_intervals(run, tmp_path):
    from eval.scores import Change, Score, Value

    copy = shutil.copytree(run, tmp_path / "scored")
    values = {"base": Value(26.2, 23.3, 29.2, 8), "finetuned": Value(4.6, 2.5, 6.6, 8)}
    score = Score("FID", "less", values, "how", Change(-21.6, -24.1, -19.3))
    metrics = {"scores": {"fid": score.as_dict()}, "verdict": "It is closer.", "warnings": ["Few!"]}
    (copy / "eval").mkdir(exist_ok=True)
    (copy / "eval" / "metrics.json").write_text(json.dumps(metrics))
    card = (exported(copy, tmp_path, name="out") / "README.md").read_text()
    assert (
        "| FID, less is better | 26.20 | 4.60 | \u221221.60 (\u221224.10 to \u221219.30) |" in card
    )
    assert "It is closer." in card and "Few!" in card


def test_what_is_there_is_not_written_over_unless_asked(run, tmp_path):
    folder = exported(run, tmp_path, name="out")
    (folder / "README.md").write_text("edited")
    with pytest.raises(UserError, match="is there already: choose another output=, or overwrite="):
        exported(run, tmp_path, name="out")
    exported(run, tmp_path, "overwrite=true", "card=false", name="out")
    assert not (folder / "README.md").exists()


def test_only_an_earlier_export_is_ever_replaced(run, world, tmp_path):
    folder = exported(run, tmp_path, name="out")
    (folder / "mine").touch()
    with pytest.raises(UserError, match="out holds mine, which no export has written"):
        exported(run, tmp_path, "overwrite=true", name="out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    for place in (tmp_path / "photos", run, run.parent):
        with pytest.raises(UserError, match="which no export has written"):
            export.main([f"run={run}", "overwrite=true", f"output={place}"])
    for place in (run / "adapter" / "new", world / "base" / "unet" / "new"):
        with pytest.raises(UserError, match="which is exported from"):
            export.main([f"run={run}", "overwrite=true", f"output={place}"])
    assert (folder / "mine").exists() and (run / "config.yaml").exists()


@pytest.mark.parametrize("beside", ["owls.md", "owls.png", "owls-images"])
def test_what_lies_beside_a_file_is_no_less_safe(run, tmp_path, beside):
    (tmp_path / beside).write_text("mine")
    with pytest.raises(UserError, match=f"{beside} is there already"):
        exported(run, tmp_path, "format=kohya", name="owls.safetensors")
    assert (tmp_path / beside).read_text() == "mine"


def test_a_configuration_of_the_same_name_stays_as_it_is(run, tmp_path):
    """`scripts/init.py output=my/cat.yaml`, and then an export to my/cat.safetensors."""
    name, own = "owls.safetensors", tmp_path / "owls.yaml"
    own.write_bytes(b"model: {path: base}\r\n")
    exported(run, tmp_path, "format=kohya", name=name)
    exported(run, tmp_path, "format=kohya", "overwrite=true", name=name)
    assert "owls.yaml" not in placing.files(tmp_path / name, "kohya")
    with pytest.raises(UserError, match="owls.yaml is not of an export"):
        exported(run, tmp_path, "format=single_file", "overwrite=true", name=name)
    assert own.read_bytes() == b"model: {path: base}\r\n"
    (alone := tmp_path / "alone.yaml").touch()
    with pytest.raises(UserError, match="alone.yaml is there already"):
        exported(run, tmp_path, "format=single_file", name=alone.with_suffix(".safetensors").name)


def test_nothing_of_an_earlier_export_stays_beside_a_file(run, tmp_path):
    name = "owls.safetensors"
    exported(run, tmp_path, "format=single_file", name=name)
    assert (tmp_path / "owls.yaml").exists()
    exported(run, tmp_path, "format=single_file", "card=false", "overwrite=true", name=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "owls.yaml"]
    (tmp_path / "owls.yaml").unlink()
    exported(run, tmp_path, "format=kohya", "overwrite=true", name=name)
    exported(run, tmp_path, "format=kohya", "card=false", "overwrite=true", name=name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_export_that_fails_leaves_what_was_there(run, tmp_path, monkeypatch):
    folder = exported(run, tmp_path, name="out")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(formats._WRITERS, "diffusers", full)
        with pytest.raises(UserError, match="cannot be written .*No space left"):
            exported(run, tmp_path, "overwrite=true", name="out")
    assert (folder / "README.md").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]
    replace, calls = os.replace, []

    def second_fails(source, goal):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, goal)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(UserError, match="Input/output error"):
        exported(run, tmp_path, "overwrite=true", "card=false", name="out")
    assert (folder / "README.md").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["merged", "single_file"])
def test_a_file_that_may_not_be_so_large_is_no_traceback(run, tmp_path, format):
    name = {"merged": "out", "single_file": "out.safetensors"}[format]
    command = ["scripts/export.py", f"run={run}", f"format={format}", f"output={tmp_path / name}"]
    limited = f"ulimit -f 20; exec {sys.executable} " + " ".join(map(shlex.quote, command))
    ended = subprocess.run(
        ["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and "cannot be written" in ended.stderr, ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_is_pushed_whole(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        push = "push_to_hub=me/owls"
        file = exported(run, tmp_path, "format=kohya", push, name="owls.safetensors")
        assert f"pushed {hub.address}/me/owls" in capsys.readouterr().out
        there = hub.files["me/owls"]
    assert there["owls.safetensors"] == file.read_bytes()
    assert there.keys() == {"README.md", file.name, "owls.png", *PICTURES}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["format=kohya", "output=a-folder"], "format=kohya is a file, NAME.safetensors"),
        (["format=merged", "output=a.safetensors"], "format=merged is a folder"),
        (["scale=0.5"], "it is chosen when generating"),
        (["adapter=x.safetensors"], "give one of run=RUN_DIRECTORY or adapter="),
        (["format=koya"], "kohya"),
        (["precison=fp16"], "precision"),
    ],
)
def test_mistakes_are_told(run, arguments, said):
    with pytest.raises(UserError, match=said):
        export.main([f"run={run}", *arguments])


def test_a_run_that_is_none_or_not_finished_is_told(run, tmp_path):
    with pytest.raises(UserError, match="no such folder; give the output= of a training run"):
        export.main([f"run={tmp_path / 'none'}"])
    copy = shutil.copytree(run, tmp_path / "half", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(UserError, match="it is not finished"):
        export.main([f"run={copy}"])
    (copy / "adapter").mkdir()
    (copy / "config.yaml").write_text("[]")
    with pytest.raises(UserError, match=r"config\.yaml does not tell its base"):
        export.main([f"run={copy}"])


def test_an_adapter_without_a_run_asks_for_its_base(run, tmp_path):
    adapter = run / "adapter" / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match="adapter= needs output="):
        export.main([f"adapter={adapter}"])
    with pytest.raises(UserError, match="format=merged needs the base: give model="):
        export.main([f"adapter={adapter}", "format=merged", f"output={tmp_path / 'out'}"])
