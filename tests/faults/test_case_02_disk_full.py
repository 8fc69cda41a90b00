"""Case 2: the disk fills up -> the run ends with what to do, the checkpoints before it are intact,
nothing is left of the one that did not fit; with more space the same command goes on."""

import re

import pytest

from tests.faults.checkpointed import left, steps
from tests.faults.removals import Removal
from tests.faults.small_disk import SmallDisk
from tests.runs import arguments

WITHOUT = [
    Removal(
        "what did not fit is removed",
        "train/checkpoint.py",
        "            with suppress(OSError):\n                self._clean()\n",
        "",
    ),
    Removal(
        "a failure beside training is kept until it is asked for",
        "train/background.py",
        "            self.error = error",
        "            pass",
    ),
    Removal(
        "files are written aside, under another name",
        "train/checkpoint.py",
        'temporary = self.folder / f"{_WRITING}{named(step)}"',
        "temporary, self._place = self.path(step), lambda *_: sync(self.folder)",
    ),
]

MIB = 2**20


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk_costs_nothing_but_the_last_steps(starter, world, tmp_path, asynchronous):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    settings = arguments(
        world,
        run,
        *("lora.rank=16", "train.steps=12", "preview.every=0"),
        *("checkpoint.every=1", "checkpoint.keep=12", f"checkpoint.asynchronous={asynchronous}"),
    )
    with SmallDisk(run / "checkpoints", 256 * MIB) as disk:
        there = starter.start(*disk.among("train/lora.py", *settings))
        there.until(lambda: any(disk.seen.glob("step-*")))
        disk.resize(4 * MIB)
        assert there.wait() == [1]
        kept, said = steps(disk.seen), there.output
        assert 1 <= kept[-1] < 12 and kept == list(range(1, kept[-1] + 1))
        assert left(disk.seen) == ""
        assert re.search(
            f"the checkpoint of step {kept[-1] + 1} could not be written to .*No space left.*"
            f"the checkpoint of step {kept[-1]} is intact. Free space there",
            said,
        )
        assert "Traceback" not in said

        disk.resize(256 * MIB)
        said = starter.finish(*disk.among("train/lora.py", *settings))
        assert steps(disk.seen)[-1] == 12
