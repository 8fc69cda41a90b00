"""Case 5: the newest checkpoint is damaged (a bit flipped, cut short, empty, a file missing) -> the
file is named, the run falls back to the one before it, and ends in the same bits."""

import os
import shutil
from pathlib import Path

import pytest

from tests.faults.checkpointed import content, flip, left, steps
from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "hashes are compared",
        "train/checkpoint_files.py",
        "if same and hashes:",
        "if False:",
    ),
    Removal(
        "files are compared with the manifest at all",
        "train/checkpoint_files.py",
        '        _check_file(path / name, listed, manifest["format"], hashes=hashes)',
        "        pass",
    ),
    Removal(
        "a damaged one is passed over",
        "train/checkpoint.py",
        "                damage.append(str(error))\n",
        "                raise\n",
    ),
    Removal(
        "a damaged one does not count among those that are kept",
        "train/checkpoint.py",
        "kept += self._is_intact(step)",
        "kept += 1",
    ),
]

DAMAGE = {
    "a bit of the weights": ("model.safetensors", flip),
    "a bit of the optimizer's state": ("optimizer.safetensors", flip),
    "weights cut short": ("model.safetensors", lambda f: os.truncate(f, f.stat().st_size - 7)),
    "an empty state": ("optimizer.safetensors", lambda f: os.truncate(f, 0)),
    "no weights": ("model.safetensors", os.remove),
    "no manifest": ("manifest.json", os.remove),
    "half a manifest": ("manifest.json", lambda f: os.truncate(f, f.stat().st_size // 2)),
}
ONE = "a bit of the optimizer's state"


def settings(world: Path, run: Path) -> list[str]:
    return arguments(world, run, "preview.every=0", "train.steps=8")


@pytest.fixture(scope="module")
def runs(starter, world, tmp_path_factory):
    """A run to the end, and one that was killed with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs")
    starter.finish("train/lora.py", *settings(world, folder / "whole"))
    killed = Fault(at="train.checkpoint:Checkpoints._prune", call=2, do="kill")
    start = settings(world, folder / "killed")
    assert starter.start("train/lora.py", *start, faults=[killed]).wait() == [-9]
    assert steps(folder / "killed/checkpoints") == [2, 4]
    return folder / "whole", folder / "killed"


@pytest.mark.parametrize(
    "kind", [kind if kind == ONE else pytest.param(kind, marks=pytest.mark.slow) for kind in DAMAGE]
)
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    starter, world, tmp_path, runs, kind
):
    whole, killed = runs
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    name, damage = DAMAGE[kind]
    damage(run / "checkpoints/step-00000004" / name)

    said = starter.finish("train/lora.py", *settings(world, run))
    assert f"step-00000004/{name}" in said and "falling back" in said
    assert "step-00000002/" not in said
    assert steps(run / "checkpoints") == [6, 8] and left(run / "checkpoints") == ""
    assert content(run) == content(whole)


@pytest.mark.slow
def test_a_damaged_one_among_those_that_are_kept_costs_no_whole_one(starter, world, tmp_path, runs):
    whole, killed = runs
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    flip(run / "checkpoints/step-00000004/model.safetensors")
    thirds = [*settings(world, run), "checkpoint.every=3"]
    after_two = Fault(at="train.checkpoint:Checkpoints._prune", call=2, after=True, do="kill")
    assert starter.start("train/lora.py", *thirds, faults=[after_two]).wait() == [-9]

    flip(run / "checkpoints/step-00000006/model.safetensors")
    said = starter.finish("train/lora.py", *thirds)
    assert "step-00000006/model.safetensors is damaged" in said
    assert "step-00000004/model.safetensors is damaged" in said
    assert steps(run / "checkpoints") == [6, 8]
    assert content(run) == content(whole)
