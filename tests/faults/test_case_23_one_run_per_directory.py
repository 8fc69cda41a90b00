"""Case 23: two runs in one output directory -> the second refuses before it loads or writes
anything; the lock of a run that was killed is taken over."""

import json
import platform
import signal

import pytest

from tests.faults.injected import Fault
from tests.faults.light import complaint, contents
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "the run directory is locked",
        "train/plan.py",
        "lock.enter_context(run_lock.locked(config.output))",
        "pass",
    ),
    Removal(
        "the lock is the kernel's, and not the file",
        "train/run_lock.py",
        "        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        if holder_of(descriptor):\n            raise OSError(errno.EAGAIN, 'held')\n",
    ),
    Removal(
        "the lock is held until the run ends",
        "train/plan.py",
        "        planned.lock,\n        _ending(config, planned),\n",
        "        planned.lock.close() or planned.lock,\n        _ending(config, planned),\n",
    ),
]


@pytest.fixture
def training(starter, world, tmp_path):
    """A run that trains, and stands still in its third step."""
    run = starter.start(
        "train/lora.py",
        *arguments(world, tmp_path / "run"),
        faults=[Fault(at="train.loop:accumulate", call=3, do="hang")],
    )
    run.until(lambda: (tmp_path / "run/checkpoints/step-00000002").exists())
    return run


def test_the_second_run_refuses_and_the_lock_of_a_killed_one_is_taken_over(
    starter, world, tmp_path, training
):
    output, values = tmp_path / "run", arguments(world, tmp_path / "run")
    before, lock = contents(output), json.loads((output / ".lock").read_text())
    assert (lock["host"], lock["pid"]) == (platform.node(), training.pids[0])

    said = complaint("train/lora.py", *values)
    assert f"output={output} is in use by another run" in said
    who = f"process {training.pids[0]} on {platform.node()}, begun {lock['started']}"
    assert who in said
    # Nor one with another configuration, which would not be let in anyway.
    assert "in use" in complaint("train/lora.py", *values, "seed=3")
    assert contents(output) == before

    training.signal(signal.SIGKILL)
    assert training.wait() == [-signal.SIGKILL]
    said = starter.finish("train/lora.py", *values)
    assert "note     took over" in said and who in said
    assert (output / "adapter").is_dir() and not (output / ".lock").exists()
