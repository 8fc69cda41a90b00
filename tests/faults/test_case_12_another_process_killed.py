"""Case 12: one of several processes is killed -> the others end within a minute, with one line that
says so; nothing lives on, and the same command ends in the same bits."""

import pytest

from tests.faults.endings import SPARSE, finished, nothing_lives, same_end
from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.faults.spoiled import spoiled
from tests.runs import arguments

WITHOUT = [
    Removal(
        "who sees another gone says so",
        "train/stopping.py",
        "        if gone is None:",
        "        if True:",
        "nothing_is_lost",
    ),
    Removal(
        "who joins does not wait for ever",
        "train/stopping.py",
        "    timer.start()\n",
        "    timer.start()\n    timer.cancel()\n",
        "even_join",
    ),
]

MINUTE = 60  # in seconds
PLACES = {
    "caching": ("data.cache:_encode_batch", 1),
    "a barrier": ("train.previews:Previews._write", 2),
    "a step": ("train.loop:accumulate", 4),
    "between backward and update": ("train.guards:PromptGuard.step", 4),
    "a validation": ("train.validation:_moved", 3),
    "a save": ("train.checkpoint:Checkpoints.save", 2),
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


@pytest.fixture(scope="module")
def whole(starter, world, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    own = looking(world, folder)
    starter.finish("train/lora.py", *arguments(world, folder / "run", *own), processes=2)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", [1, 0])
def test_the_others_end_and_nothing_is_lost(starter, world, tmp_path, whole, place, rank):
    output = tmp_path / "run"
    own = looking(world, tmp_path)
    command = ["train/lora.py", *arguments(world, output, *own)]
    at, call = PLACES[place]
    kill = Fault(at=at, call=call, do="kill", rank=rank)
    run = starter.start(*command, processes=2, faults=[kill])
    codes = run.wait(MINUTE)
    assert codes[rank] == -9 and codes[1 - rank] == 1, f"{codes}\n{run.output}"
    nothing_lives(run)
    assert run.output.count("another process of this run has gone") == 1
    assert "Traceback" not in run.output
    finished(starter, command, output, processes=2)
    same_end(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_does_not_even_join_is_not_waited_for_long(starter, world, tmp_path, rank):
    command = ["train/lora.py", *arguments(world, tmp_path / "run", *SPARSE)]
    kill = Fault(at="train.launch:open_accelerator", do="kill", rank=rank)
    run = starter.start(*spoiled("impatient"), *command, processes=2, faults=[kill])
    codes = run.wait(MINUTE)
    assert codes[rank] == -9 and codes[1 - rank] == 1, f"{codes}\n{run.output}"
    if rank == 1:  # without the first, there is nowhere to come to
        assert "error: the other processes of this run have not come in 3 s" in run.output


@pytest.mark.slow
def test_a_launcher_s_others_end_too(starter, world, tmp_path):
    output = tmp_path / "run"
    command = ["train/lora.py", *arguments(world, output, *looking(world, tmp_path))]
    kill = Fault(at="train.loop:accumulate", call=4, do="kill", rank=1)
    run = starter.start(*command, processes=2, launcher="torchrun", faults=[kill])
    assert run.wait(2 * MINUTE) == [1]
    nothing_lives(run)
    finished(starter, command, output, processes=2)
