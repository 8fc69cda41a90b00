"""Case 4: too little space for what a run will write -> it is refused before step 1, with what it
needs and what is there, and has written nothing."""

import re

import pytest

from tests.faults.injected import Fault
from tests.faults.light import finish
from tests.faults.mounts import LEFT, needs_mounts, small
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal("space is looked for", "train/rundir.py", "if free < needed:", "if False:"),
    Removal(
        "space for checkpoints is",
        "train/plan.py",
        'rundir.check_space(config.output, needed, what="checkpoints")',
        "pass",
    ),
    Removal(
        "space for the cache is",
        "train/plan.py",
        'rundir.check_space(config.data.cache, cached, what="cached latents and captions")',
        "pass",
    ),
    Removal(
        "a run that is resumed needs space too",
        "train/plan.py",
        "    if not kept:\n",
        "    if kept:\n        return\n    if not kept:\n",
    ),
]
BOTH = re.compile(r"not enough space in (\S+) for (.+): (.+) needed, (.+) free")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def refused(values, within):
    """Folder, what for, the two numbers in MiB, and the names of what is left there."""
    left, error = finish("train/lora.py", *values, code=2, within=within)
    said = BOTH.search(error)
    assert said is not None, error
    folder, what, needed, free = said.groups()
    assert size(free) < size(needed)
    return folder, what, size(needed), size(free), left.rpartition(LEFT)[2].split()


def size(text):
    number, unit = text.split()
    return float(number) * {"GiB": 2**10, "MiB": 1}[unit]


@needs_mounts
def test_a_run_that_will_not_fit_is_refused_with_nothing_written(world, disk):
    found = refused(arguments(world, disk / "run"), small(disk, "16m"))
    folder, what, needed, free, left = found
    assert (folder, what, left) == (str(disk / "run"), "checkpoints", [])
    assert needed > 64 and 15 < free <= 16


@needs_mounts
def test_a_cache_that_will_not_fit_is_refused(world, disk, tmp_path):
    values = arguments(world, tmp_path / "run", f"data.cache={disk}")
    folder, what, _, _, _ = refused(values, small(disk, "1m"))
    assert (folder, what) == (str(disk), "cached latents and captions")
    assert not (tmp_path / "run").exists()


@needs_mounts
def test_with_space_enough_it_is_not_refused(world, disk):
    values = arguments(world, disk / "run", "dry_run=true")
    said, _ = finish("train/lora.py", *values, within=small(disk, "1g"))
    assert "nothing trained" in said


@needs_mounts
@pytest.mark.slow
def test_a_run_that_is_resumed_needs_space_for_its_next_checkpoint(starter, world, tmp_path, disk):
    run = starter.start(
        "train/lora.py",
        *arguments(world, tmp_path / "run"),
        faults=[Fault(at="train.loop:accumulate", call=6, do="kill")],
    )
    assert run.wait() == [-9]
    within = small(disk, "16m", copied=tmp_path / "run")
    folder, what, _, _, left = refused(arguments(world, disk), within)
    assert (folder, what) == (str(disk), "checkpoints")
    assert "checkpoints/step-00000004/model.safetensors" in left and ".lock" not in left
