"""What scripts/generate.py refuses to replace, the ends of its ranges, and how it is stopped."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from eval import processes
from eval.generation import read_settings
from scripts import generate
from scripts.generation import outputs
from train.config import ROOT, UserError

HOW = ["steps=2", "width=64", "height=32"]


@pytest.fixture
def make(base, tmp_path):
    def run(*arguments, output="out"):
        generate.main([f"model={base}", f"output={tmp_path / output}", *HOW, *arguments])

    return run


def test_pictures_of_other_settings_or_of_others_are_kept_until_told(make, tmp_path):
    make("prompt=a cat", "grid=true")
    file, config = tmp_path / "out/00000.png", tmp_path / "out/config.yaml"
    before = file.read_bytes(), config.read_bytes()
    with pytest.raises(UserError, match=r"00000.png .*settings \(prompt\).*overwrite=true"):
        make("prompt=a dog")
    assert (file.read_bytes(), config.read_bytes()) == before
    make("prompt=a dog", "overwrite=true")
    assert read_settings(file)["prompt"] == "a dog" and "overwrite: false" in config.read_text()
    Image.new("RGB", (8, 8)).save(tmp_path / "out/00001.png")
    with pytest.raises(UserError, match="00001.png is there and does not say"):
        make("prompt=a dog", "count=2")
    (tmp_path / "out/00001.png").unlink()
    make("prompt=a dog", "count=2", "grid=true")
    Image.new("RGB", (8, 8)).save(tmp_path / "out/grid.png")
    with pytest.raises(UserError, match="grid.png is there"):
        make("prompt=a dog", "count=2", "grid=true")


@pytest.mark.parametrize("kept", [0, 10, -40])
def test_a_torn_picture_is_made_again(make, tmp_path, kept):
    make("prompt=a cat")
    file = tmp_path / "out/00000.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    make("prompt=a cat")
    assert file.read_bytes() == whole


@pytest.mark.parametrize("key", ["image", "mask"])
def test_what_is_drawn_from_is_never_drawn_over(make, tmp_path, key):
    (tmp_path / "out").mkdir()
    own, other = tmp_path / "out/00000.png", tmp_path / "other.png"
    for file in (own, other):
        Image.fromarray(np.full((32, 64, 3), 255, np.uint8)).save(file)
    before = own.read_bytes()
    files = {"image": other, "mask": other} | {key: own}
    keys = [f"{name}={file}" for name, file in files.items()]
    with pytest.raises(UserError, match=f"{key}=.*00000.png would be replaced .*another output="):
        make("prompt=a cat", "overwrite=true", *keys)
    assert own.read_bytes() == before and not (tmp_path / "out/config.yaml").exists()


def test_a_refusal_of_the_main_process_ends_the_others(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda value: ["output=x is not ours", value])
    with pytest.raises(UserError, match="output=x is not ours"):
        outputs.by_the_first(SimpleNamespace(is_main_process=False), lambda: pytest.fail("worked"))


@pytest.mark.parametrize(
    "keys",
    [[f"seed={2**63}"], [f"seed={2**63 - 1}", "count=2"], [f"seeds=[1, {2**63}]"], ["file"]],
)
def test_seeds_end_where_generators_do(make, tmp_path, keys):
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    shown = "prompt=a cat"
    if keys == ["file"]:
        shown, keys = f"prompt_file={tmp_path / 'two.txt'}", [f"seed={2**63 - 1}"]
    with pytest.raises(UserError, match=r"has to be below 2\*\*63"):
        make(shown, *keys)
    make("prompt=a cat", f"seed={2**63 - 1}")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_ends_with_a_line_and_the_same_command_goes_on(base, tmp_path, number, code):
    text = (
        "import signal; from scripts import generate; from scripts.generation import drawing\n"
        "from train.config import command\n"
        f"drawing.Drawing.sample = lambda *_: signal.raise_signal({int(number)})\n"
        "command(generate.main)"
    )
    arguments = [f"model={base}", f"output={tmp_path / 'out'}", *HOW, "prompt=a cat"]
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert f"{number.name}: the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    generate.main(arguments)
    assert (tmp_path / "out/00000.png").exists()
