"""Case 25: resumed with another configuration, base or pictures -> everything that differs is
listed, and the run goes on only where checkpoint.accept_changes=true says so."""

import json
import shutil
import signal

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.injected import Fault
from tests.faults.light import complaint, contents
from tests.faults.removals import Removal
from tests.runs import arguments

AGREED = "checkpoint.accept_changes=true"
WITHOUT = [
    Removal(
        "configurations are compared",
        "train/changes.py",
        "        *_of_configuration(config),\n",
        "",
    ),
    Removal(
        "pictures are compared",
        "train/changes.py",
        '        *_of_pictures(manifest.get("dataset") or {}, dataset),\n',
        "",
    ),
    Removal(
        "the base's weights are compared",
        "train/changes.py",
        "found = list(_of_hashes(before, hashes))",
        "found = []",
    ),
    Removal(
        "changes are refused that nobody has agreed to",
        "train/changes.py",
        "if others and not config.checkpoint.accept_changes:",
        "if False:",
    ),
    Removal(
        "so are those that no checkpoint fits, agreed to or not",
        "train/changes.py",
        "    if impossible:\n",
        "    if False:\n",
    ),
    Removal(
        "what was agreed to is put down",
        "train/rundir.py",
        "*([now] if changes else [])",
        "",
    ),
    Removal(
        "an agreement holds once",
        "train/rundir.py",
        'update={"accept_changes": False}',
        "update={}",
    ),
]


@pytest.fixture(scope="module")
def begun(starter, world, tmp_path_factory):
    """A run of six steps that was killed after the checkpoint of step 4, with its own base and
    pictures."""
    folder = tmp_path_factory.mktemp("begun")
    for part in ("base", "pictures"):
        shutil.copytree(world / part, folder / part)
    run = starter.start(
        "train/lora.py",
        *arguments(folder, folder / "run", "checkpoint.asynchronous=false"),
        faults=[Fault(at="train.loop:accumulate", call=5, do="kill")],
    )
    assert run.wait() == [-signal.SIGKILL]
    (folder / "run/.lock").unlink()
    return folder


@pytest.fixture
def mine(begun, tmp_path):
    """A copy of it, to be changed, in the same place."""
    away = begun.with_name(f"{begun.name}-away")
    shutil.copytree(begun, away)
    yield begun
    shutil.rmtree(begun)
    away.rename(begun)


def change_caption(folder):
    next((folder / "pictures").glob("*.txt")).write_text("something else")


def add_picture(folder):
    for suffix in (".png", ".txt"):
        first = min((folder / "pictures").glob(f"*{suffix}"))
        shutil.copy(first, first.with_name(f"one-more{suffix}"))


def change_base(folder):
    file = folder / "base/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})


def test_all_that_differs_is_listed_before_anything_is_loaded(mine):
    add_picture(mine)
    before = contents(mine / "run")
    changed = ["optim.learning_rate=0.02", "seed=1", "train.steps=8", "checkpoint.every=3"]
    said = complaint("train/lora.py", *arguments(mine, mine / "run", *changed))
    for line in (
        "seed: 0 -> 1",
        "train.steps: 6 -> 8 (the learning rate's schedule spans all steps",
        "optim.learning_rate: 0.01 -> 0.02",
        "pictures: 9 pictures -> 10",
        AGREED,
    ):
        assert line in said
    assert "checkpoint.every" not in said  # which changes nothing that is trained
    assert contents(mine / "run") == before


def test_a_changed_caption_alone_is_noticed(mine):
    change_caption(mine)
    said = complaint("train/lora.py", *arguments(mine, mine / "run"))
    assert "dataset: " in said and "other pictures, captions or sizes, as many" in said


def test_a_changed_base_is_noticed_and_what_is_agreed_to_goes_on_and_is_put_down(starter, mine):
    change_base(mine)
    before = contents(mine / "run")
    said = starter.finish("train/lora.py", *arguments(mine, mine / "run"), code=2)
    assert "base.unet: " in said and AGREED in said
    assert contents(mine / "run") == before

    changed = ["optim.learning_rate=0.02", "checkpoint.every=3"]
    values = arguments(mine, mine / "run", *changed)
    said = starter.finish("train/lora.py", *values, AGREED)
    assert "note     goes on with another optim.learning_rate: 0.01 -> 0.02" in said
    assert "note     goes on with another checkpoint.every: 2 -> 3" in said
    assert "note     goes on with another base.unet: " in said

    run = mine / "run"
    (entry,) = json.loads((run / "manifest.json").read_text())["changes"]
    assert entry["step"] == 4 and entry["time"]
    assert [line.partition(":")[0] for line in entry["changes"]] == [
        "optim.learning_rate",
        "base.unet",
    ]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["optim"]["learning_rate"] == 0.02
    assert settings["checkpoint"] == settings["checkpoint"] | {"every": 3, "accept_changes": False}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (rate,) = [line["lr"] for line in lines if line["step"] == 5 and "lr" in line]
    assert rate == pytest.approx(0.02 * 0.1464, rel=0.01)  # three quarters down the cosine
    assert "is finished" in starter.finish("train/lora.py", *values)


def test_what_no_checkpoint_fits_is_refused_even_if_agreed_to(begun):
    values = arguments(begun, begun / "run", "lora.rank=4", "seed=1", AGREED)
    said = complaint("train/lora.py", *values)
    assert "cannot go on with lora.rank: 2 -> 4: " in said and "besides: seed: 0 -> 1" in said
