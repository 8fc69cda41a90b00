"""Case 1: kill -9 in any phase of a checkpoint -> what is there is complete, what is left of the
other is cleared away, and the same command ends in the same bits."""

import json

import pytest

from tests.faults.checkpointed import content, flip, left, steps
from tests.faults.injected import Fault, record, recorded
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "files are written aside, under another name",
        "train/checkpoint.py",
        'temporary = self.folder / f"{_WRITING}{named(step)}"',
        "temporary, self._place = self.path(step), lambda *_: sync(self.folder)",
        tests="some",
    ),
    Removal(
        "fsync of the files",
        "train/checkpoint_files.py",
        "            to_disk(file)\n        return",
        "        return",
        tests="on_the_disk",
    ),
    Removal(
        "fsync of the folder",
        "train/checkpoint.py",
        "        os.replace(temporary, path)\n        sync(self.folder)",
        "        os.replace(temporary, path)",
        tests="on_the_disk",
    ),
    Removal(
        "what is pruned changes its name first",
        "train/checkpoint.py",
        "shutil.rmtree(self._set_aside(self.path(step), _REMOVED), ignore_errors=True)",
        "shutil.rmtree(self.path(step), ignore_errors=True)",
        tests="some",
    ),
    Removal(
        "pruning waits until the new one is there",
        "train/checkpoint.py",
        "            self._write(step, files, facts)\n",
        "            for old in self.steps()[: 1 - self.keep]:\n"
        "                shutil.rmtree(self.path(old))\n"
        "            self._write(step, files, facts)\n",
        tests="some",
    ),
    Removal(
        "what is replaced has its name back if the new one did not come",
        "train/checkpoint.py",
        "                os.replace(path, name)",
        "                pass",
        tests="some",
    ),
    Removal(
        "leftovers are cleared away",
        "train/checkpoint.py",
        "        if self.writes:\n            self._clean()",
        "",
        tests="some",
    ),
]

FILES, CHECKPOINTS = "train.checkpoint_files", "train.checkpoint:Checkpoints"
SET_ASIDE = f"{CHECKPOINTS}._set_aside"
# Where a run is killed while it saves its first checkpoint, and what that leaves.
BEFORE_THE_NAME = {
    "before the first file": (Fault(at=f"{FILES}:write_pieces", do="kill"), ".writing"),
    "in the first file": (Fault(at=f"{FILES}:append", call=2, do="kill"), ".writing"),
    "before its fsync": (Fault(at=f"{FILES}:to_disk", do="kill"), ".writing"),
    "in the second file": (Fault(at=f"{FILES}:append", call=4, do="kill"), ".writing"),
    "in the manifest": (Fault(at=f"{FILES}:append", call=5, do="kill"), ".writing"),
    "before the folder's fsync": (Fault(at=f"{FILES}:sync", do="kill"), ".writing"),
    "before its name": (Fault(at=f"{CHECKPOINTS}._place", do="kill"), ".writing"),
}
AFTER_THE_NAME = {
    "before the name's fsync": (Fault(at=f"{FILES}:sync", call=2, do="kill"), ""),
    "before the older ones go": (Fault(at=f"{CHECKPOINTS}._prune", do="kill"), ""),
    "while one goes": (Fault(at=SET_ASIDE, call=2, after=True, do="kill"), ".removed"),
}
BETWEEN_NAMES = Fault(at=SET_ASIDE, after=True, do="kill")
STEPS = 6


def settings(world, run, asynchronous):
    more = ("checkpoint.every=1", "preview.every=0", f"train.steps={STEPS}")
    return arguments(world, run, *more, f"checkpoint.asynchronous={asynchronous}")


FEW = ("in the first file", "in the manifest", "before its name", "while one goes")
ALL = (*BEFORE_THE_NAME, *AFTER_THE_NAME)


@pytest.mark.parametrize(
    ("asynchronous", "phases"),
    [
        pytest.param("true", FEW, id="some"),
        pytest.param("true", ALL, id="all", marks=pytest.mark.slow),
        pytest.param("false", ALL, id="all-in-turn", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_any_phase_of_a_checkpoint_loses_nothing(
    starter, world, tmp_path, asynchronous, phases
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    starter.finish("train/lora.py", *settings(world, whole, asynchronous))

    def killed(what: str, fault: Fault, remains: str, newest: int) -> None:
        """One more start, which gets as far as the checkpoint of step `newest`."""
        replacing = ".replaced" in remains
        there = starter.start("train/lora.py", *settings(world, run, asynchronous), faults=[fault])
        assert there.wait() == [-9], f"{what}:\n{there.output}"
        found = steps(run / "checkpoints")
        assert found[-1] == newest and len(found) >= (1 if replacing else 2), what
        assert left(run / "checkpoints") == remains, what

    first = Fault(at=f"{CHECKPOINTS}.save", call=3, do="kill")
    killed("after two checkpoints", first, "", 2)
    newest = 2
    for phase in phases:
        newest += phase in AFTER_THE_NAME
        killed(phase, *(BEFORE_THE_NAME | AFTER_THE_NAME)[phase], newest)

    # It is damaged, made again, and its maker killed when the old one is aside, the new one not
    # there yet.
    flip(run / f"checkpoints/step-{newest:08d}/model.safetensors")
    killed("between two names", BETWEEN_NAMES, ".replaced .writing", newest - 1)
    said = starter.finish("train/lora.py", *settings(world, run, asynchronous))
    assert f"step-{newest:08d}/model.safetensors is damaged" in said
    assert left(run / "checkpoints") == ""
    assert steps(run / "checkpoints") == [STEPS - 1, STEPS]
    assert content(run) == content(whole)


def test_all_is_on_the_disk_before_it_has_its_name_and_older_ones_go_last(starter, world, tmp_path):
    events, run = tmp_path / "events", tmp_path / "run"
    watched = {
        f"{FILES}:to_disk": "file",
        f"{FILES}:sync": "folder",
        f"{CHECKPOINTS}._place": "name",
        f"{CHECKPOINTS}._prune": "prune",
    }
    faults = [record(events, at) for at in watched]
    starter.finish("train/lora.py", *settings(world, run, "true"), "train.steps=2", faults=faults)
    seen = [watched[line["at"]] for line in recorded(events)]
    one = ["file", "file", "file", "folder", "name", "folder", "prune"]
    assert seen[:8] == ["folder", *one]  # at first that of the run
    assert seen[8:15] == one
    manifest = json.loads((run / "checkpoints/step-00000002/manifest.json").read_text())
    assert manifest["files"].keys() == {"model.safetensors", "optimizer.safetensors"}
