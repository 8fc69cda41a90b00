"""Case 11: a run that is asked to end is asked again -> the first one's checkpoint is completed
whatever else comes; only a second Ctrl-C, two seconds later, ends it at once, with nothing torn."""

import signal
import time

import pytest

from tests.faults.chains import newest
from tests.faults.endings import (
    SPARSE,
    by_itself,
    ended_by,
    finished,
    nothing_lives,
    same_end,
    steps,
)
from tests.faults.injected import Fault, record, recorded
from tests.faults.removals import Removal
from tests.faults.spoiled import spoiled
from tests.runs import arguments

WITHOUT = [
    Removal(
        "only a second SIGINT ends a run at once",
        "train/stopping.py",
        "    elif number == signal.SIGINT and now - first > _SECOND_SECONDS:",
        "    else:",
        "first_one",
    ),
    Removal(
        "not one that a launcher passes on",
        "train/stopping.py",
        "_SECOND_SECONDS = 2.0",
        "_SECOND_SECONDS = 0.0",
        "second_ctrl",
    ),
    Removal(
        "a second SIGINT ends it",
        "train/stopping.py",
        "        os._exit(128 + number)",
        "        return",
        "second_ctrl",
    ),
    Removal(
        "on its way out a process hears nothing more",
        "train/stopping.py",
        "        after = dict.fromkeys(SIGNALS, signal.SIG_IGN)\n",
        "",
        "first_one",
    ),
]

STEP, SAVE, SYNC = "train.loop:accumulate", "train.checkpoint:Checkpoints.save", "os:fsync"


@pytest.mark.slow
def test_the_first_one_s_save_completes(starter, world, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    starter.finish("train/lora.py", *arguments(world, whole, *SPARSE))
    command = ["train/lora.py", *arguments(world, output, *SPARSE)]
    again = [
        by_itself("SIGUSR1", SAVE),
        by_itself("SIGTERM", "train.checkpoint_files:to_disk"),
        by_itself("SIGTERM", "train.checkpoint:Checkpoints._place"),
        by_itself("SIGINT", "train.stopping:_tell"),
    ]
    faults = [by_itself("SIGTERM", STEP, 2), *again]
    run = starter.start(*spoiled("leaving"), *command, faults=faults)
    ended_by("SIGTERM", run, output, step=2)
    assert steps(output) == [2]
    finished(starter, command, output)
    same_end(output, whole)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(starter, world, tmp_path):
    whole, output, saves = tmp_path / "whole", tmp_path / "run", tmp_path / "saves"
    own = (*SPARSE, "checkpoint.every=2", "checkpoint.asynchronous=false", "data.workers=2")
    starter.finish("train/lora.py", *arguments(world, whole, *own))
    command = ["train/lora.py", *arguments(world, output, *own)]
    # The second checkpoint never gets on to the disk.
    never = Fault(at="train.checkpoint:Checkpoints._place", call=2, do="hang")
    run = starter.start(*command, faults=[record(saves, SAVE), never])
    run.until(lambda: len(recorded(saves)) == 2)
    for _ in range(3):  # as a terminal, a launcher and a wrapper may send the same one
        run.signal(signal.SIGINT)
        time.sleep(0.2)
    assert run.running
    time.sleep(2)
    run.signal(signal.SIGINT)
    assert run.wait(5) == [130]
    nothing_lives(run)
    assert "SIGINT again: ending without saving" in run.output
    assert newest(output) == 2
    finished(starter, command, output)
    same_end(output, whole)
