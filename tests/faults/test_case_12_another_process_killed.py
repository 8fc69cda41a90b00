"""Case 12: one of several processes is killed -> the others end within a minute, with one line that
says so; nothing lives on, and the same command ends in the same bits."""

import pytest

from tests.faults.endings import SPARSE, finished, nothing_lives, same_end
from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "who sees another gone says so",
        "train/stopping.py",
        "        if gone is None:",
        "        if True:",
    ),
    Removal(
        "checkpoints",
        "train/pauses.py",
        "        if self._due(done, self.config.checkpoint.every):\n            self._save(done)\n",
        "",
    ),
]

MOST, MINUTE = "train.stopping:Agreement.most", 60
PLACES = {
    "caching": ("data.cache:_encode_batch", 1, 0),
    "a barrier": ("train.previews:Previews._write", 2, 2),
    "a step": ("train.loop:accumulate", 4, 2),
    "between backward and update": ("train.guards:Guard.passes", 4, 2),
    "a validation": ("train.validation:_moved", 3, 2),
    "a save": ("train.pauses:Pause._save", 2, 2),
}


def looking(world, tmp_path):
    return (
        *SPARSE,
        "checkpoint.every=2",
        "preview.every=3",
        f"validation.path={world / 'pictures'}",
        "validation.every=2",
        "validation.images=4",
        "data.workers=2",
        f"data.cache={tmp_path / 'cache'}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", [1, 0])
def test_the_others_end_and_nothing_is_lost(starter, world, tmp_path, place, rank):
    whole, output = tmp_path / "whole", tmp_path / "run"
    own = looking(world, tmp_path)
    command = ["train/lora.py", *arguments(world, output, *own)]
    at, call, kept = PLACES[place]
    kill = Fault(at=at, call=call, do="kill", rank=rank)
    run = starter.start(*command, processes=2, faults=[kill])
    codes = run.wait(MINUTE)
    assert codes[rank] == -9 and codes[1 - rank] == 1, f"{codes}\n{run.output}"
    nothing_lives(run)
    assert run.output.count("another process of this run has gone") == 1
    assert "Traceback" not in run.output
    finished(starter, command, output, processes=2)
    starter.finish("train/lora.py", *arguments(world, whole, *own), processes=2)
    same_end(output, whole)


@pytest.mark.slow
def test_a_launcher_s_others_end_too(starter, world, tmp_path):
    output = tmp_path / "run"
    command = ["train/lora.py", *arguments(world, output, *looking(world, tmp_path))]
    kill = Fault(at="train.loop:accumulate", call=4, do="kill", rank=1)
    run = starter.start(*command, processes=2, launcher="torchrun", faults=[kill])
    assert run.wait(2 * MINUTE) == [1]
    nothing_lives(run)
    finished(starter, command, output, processes=2)
