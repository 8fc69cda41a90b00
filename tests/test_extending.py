"""docs/extending.md: its excerpts are those of docs/examples, and each does what it says."""

import json
import re
import shutil
import textwrap

import numpy as np
import pytest
from safetensors.torch import load_file

from data import captions
from docs.examples import add_method, add_metric, add_source
from eval import measuring
from tests.runs import ROOT, arguments, make_world
from tests.tiny import tiny_clip
from train import lora
from train.config import UserError, read_yaml

PAGE = (ROOT / "docs/extending.md").read_text("utf-8")
EXAMPLES = {
    name: (ROOT / f"docs/examples/{name}.py").read_text("utf-8")
    for name in ("add_method", "add_source", "add_metric")
}


def closer(text):
    """With one empty line where the formatter, which knows no class around it, has put two."""
    return re.sub(r"\n{3,}", "\n\n", text)


def test_the_page_shows_each_example_as_it_is():
    """Fails where an example is changed and the page is not."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    whole = [closer(text) for text in EXAMPLES.values()]
    for block in blocks:
        shown = closer(block.strip("\n"))
        indented = (textwrap.indent(shown, " " * depth) for depth in (0, 4, 8))
        assert any(text in example for text in indented for example in whole), block
    for name in EXAMPLES:
        assert f"examples/{name}.py" in PAGE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def tiny(world, output, *overrides):
    """The arguments of tests/tiny.yaml without its section lora."""
    _, *rest = arguments(world, output, *overrides)
    values = read_yaml(ROOT / "tests/tiny.yaml")
    del values["lora"]
    output.parent.mkdir(parents=True, exist_ok=True)
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps(values))
    return [f"--config={config}", *rest]


SHORT = ("train.steps=4", "preview.every=0", "checkpoint.every=2")


@pytest.mark.slow
def test_the_method_trains_what_it_says_exports_and_resumes(world, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    add_method.main(tiny(world, whole, *SHORT))
    before = load_file(world / "base/unet/diffusion_pytorch_model.safetensors")
    after = load_file(whole / "full/unet/diffusion_pytorch_model.safetensors")
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    saved = load_file(whole / "checkpoints/step-00000004/model.safetensors")
    assert {name.removeprefix("unet.") for name in saved} == moved

    add_method.main(tiny(world, resumed, *SHORT))
    for path in ("full", "checkpoints/step-00000004"):
        (resumed / path).rename(tmp_path / path.replace("/", "-"))
    add_method.main(tiny(world, resumed, *SHORT))
    again = load_file(resumed / "full/unet/diffusion_pytorch_model.safetensors")
    assert all((after[name] == again[name]).all() for name in after)


def test_the_method_checks_its_own_keys(world, tmp_path, capsys):
    with pytest.raises(UserError, match="cross_attention.projections"):
        add_method.main(tiny(world, tmp_path / "run", "cross_attention.projections=[to_q]"))
    values = ("cross_attention.projections=[to_v]", "dry_run=true")
    add_method.main(tiny(world, tmp_path / "run", *values))
    assert "nothing trained" in capsys.readouterr().out


# A source


@pytest.fixture
def folders(world, tmp_path, monkeypatch):
    """The world's pictures in two folders, without captions."""
    monkeypatch.setattr(captions, "OTHERS", [])
    for number, picture in enumerate(sorted((world / "pictures").glob("*.png"))):
        folder = tmp_path / "set" / ("10_red_circle" if number % 2 else "blue star")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    return tmp_path / "set"


def test_the_source_takes_captions_from_folders(world, folders, tmp_path, capsys):
    values = arguments(world, tmp_path / "run", f"data.path={folders}", "dry_run=true")
    with pytest.raises(UserError, match="no captions"):
        lora.main(values)
    add_source.main(values)
    assert "captioned by the folders" in capsys.readouterr().out
    (found,) = captions.OTHERS
    from data.listing import list_folder

    layout = found(list_folder(folders), None)
    assert layout is not None
    assert {layout.captions(name) for name in layout.pictures} == {("red circle",), ("blue star",)}


def test_the_source_leaves_other_folders_alone(world, folders):
    from data.listing import list_folder

    assert add_source.by_folder(list_folder(world / "pictures"), None) is None
    assert add_source.by_folder(list_folder(folders), "a default") is None
    outside = next(folders.glob("*/*.png")).rename(folders / "outside.png")
    assert add_source.by_folder(list_folder(folders), None) is None
    outside.unlink()
    assert add_source.by_folder(list_folder(folders), None) is not None
    (folders / "blue star").rename(folders / "Images")  # which no picture shows
    assert add_source.by_folder(list_folder(folders), None) is None
    shutil.rmtree(folders / "Images")  # and one folder alone is named for who knows what
    assert add_source.by_folder(list_folder(folders), None) is None
    shutil.rmtree(folders)
    folders.mkdir()
    assert add_source.by_folder(list_folder(folders), None) is None


@pytest.mark.slow
def test_the_source_trains(world, folders, tmp_path):
    add_source.main(arguments(world, tmp_path / "run", f"data.path={folders}", *SHORT))
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()


# A metric


def test_the_metric_is_the_papers():
    grey = np.full((4, 4, 3), 77, np.uint8)
    assert add_metric.colourfulness(grey) == 0
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200  # rg = 200, yb = 100 everywhere, no spread
    assert add_metric.colourfulness(red) == pytest.approx(0.3 * np.hypot(200, 100))
    halves = np.zeros((2, 2, 3), np.uint8)
    halves[0, :, 0], halves[1, :, 1] = 200, 200  # rg = 200 and -200, yb = 100
    assert add_metric.colourfulness(halves) == pytest.approx(200 + 0.3 * 100)


def test_a_metric_takes_no_other_s_name():
    """Fails where one called fid stands in the place of the project's."""
    other = add_metric.score
    assert measuring._new({"colourfulness": other}, {"fid": other})
    for name in ("fid", "copies"):
        with pytest.raises(ValueError, match=f"called {name}, as another score is: rename it"):
            measuring._new({name: other}, {"fid": other})


@pytest.mark.slow
def test_the_metric_is_in_the_table_with_interval_and_change(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "OTHERS", [])
    tiny_clip(tmp_path / "clip", dimension=4)
    run = tmp_path / "run"
    lora.main(arguments(world, run, *SHORT))
    how = (f"evaluation.path={world / 'pictures'}", f"evaluation.clip={tmp_path / 'clip'}")
    few = ("evaluation.images=6", "evaluation.steps=2", "evaluation.batch_size=6")
    add_metric.main([f"run={run}", *how, *few])
    found = json.loads((run / "eval/metrics.json").read_text())["scores"]["colourfulness"]
    assert found["values"].keys() == {"base", "finetuned"}
    assert found["values"]["base"]["low"] < found["values"]["base"]["value"]
    moved = found["values"]["finetuned"]["value"] - found["values"]["base"]["value"]
    assert found["change"]["value"] == pytest.approx(moved)
    assert "Colourfulness" in capsys.readouterr().out
    assert "Colourfulness" in (run / "eval/report.html").read_text()
