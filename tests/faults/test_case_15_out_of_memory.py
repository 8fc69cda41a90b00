"""Case 15: out of memory in a step or a validation -> the run ends, naming its last checkpoint and
what to lower, and goes on from there; in a preview -> there are none, and nothing else changes."""

import pytest

from tests.faults.chains import newest
from tests.faults.endings import SPARSE, nothing_lives, same_end
from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.faults.spoiled import spoiled
from tests.runs import arguments

WITHOUT = [
    Removal(
        "a step's is named",
        "train/guards.py",
        "        if not is_out_of_memory(error):",
        "        if True:",
        "names_the_last",
    ),
    Removal(
        "with the last checkpoint, once it is written",
        "train/guards.py",
        "            checkpoints.wait()\n",
        "            pass\n",
        "names_the_last",
    ),
    Removal(
        "torch's own allocator is known",
        "train/guards.py",
        "    return isinstance(error, Exception) and should_reduce_batch_size(error)",
        "    return False",
        "before_the_first",
    ),
    Removal(
        "a preview's costs the previews alone",
        "train/previews.py",
        "        if not is_out_of_memory(error):",
        "        if True:",
        "preview",
    ),
]

FORWARD, PREVIEW = "train.denoiser:Denoiser.forward", "train.previews:Previews._picture"
OFTEN = (*SPARSE, "checkpoint.every=2")
CUDA = "out of memory (CUDA out of memory. Tried to allocate 20.00 MiB); "


def error_of(said):
    assert "Traceback" not in said
    (error,) = [line for line in said.splitlines() if line.startswith("error")]
    return error


def test_a_step_s_names_the_last_checkpoint_and_what_to_lower(starter, world, tmp_path):
    """Although that was still being written."""
    output = tmp_path / "run"
    entry = ["train/lora.py", *arguments(world, output, *OFTEN)]
    oom = Fault(at=FORWARD, call=5, do="oom")
    error = error_of(starter.finish(*spoiled("late"), *entry, faults=[oom], code=1))
    assert f"{CUDA}the checkpoint of step 2 is kept." in error
    assert "train.micro_batch_size=1 in place of 2" in error
    assert "train.gradient_checkpointing=true" in error
    assert newest(output) == 2 and not (output / "adapter").exists()
    lowered = ("train.micro_batch_size=1", "train.gradient_checkpointing=true")
    starter.finish(*entry, *lowered)
    assert newest(output) == 6 and (output / "adapter").exists()


@pytest.mark.slow
def test_before_the_first_checkpoint_there_is_none_to_name(starter, world, tmp_path):
    """And torch's own allocator says it."""
    entry = ["train/lora.py", *arguments(world, tmp_path / "run", *OFTEN)]
    error = error_of(starter.finish(*spoiled("memory", 2), *entry, code=1))
    assert "can't allocate memory: you tried to allocate" in error
    assert "there is no checkpoint yet." in error


@pytest.mark.slow
def test_of_two_processes_the_other_ends_too(starter, world, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    own = (*OFTEN, "checkpoint.asynchronous=false")
    starter.finish("train/lora.py", *arguments(world, whole, *own), processes=2)
    entry = ["train/lora.py", *arguments(world, output, *own)]
    oom = Fault(at=FORWARD, call=3, do="oom", rank=1)
    run = starter.start(*entry, processes=2, faults=[oom])
    assert run.wait(60) == [1, 1]
    nothing_lives(run)
    assert "Traceback" not in run.output
    assert f"error (process 1): {CUDA}the checkpoint of step 2 is kept." in run.output
    assert "error: another process of this run has gone" in run.output
    starter.finish(*entry, processes=2)
    same_end(output, whole)


@pytest.mark.slow
def test_a_validation_s_loses_nothing(starter, world, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    looks = (f"validation.path={world / 'pictures'}", "validation.every=3", "validation.images=4")
    own = (*OFTEN, *looks)
    starter.finish("train/lora.py", *arguments(world, whole, *own))
    entry = ["train/lora.py", *arguments(world, output, *own)]
    oom = Fault(at="train.validation:Validation.run", call=2, do="raise:MemoryError")
    error = error_of(starter.finish(*entry, faults=[oom], code=1))
    assert "out of memory (injected); the checkpoint of step 2 is kept." in error
    starter.finish(*entry)
    same_end(output, whole)


@pytest.mark.slow
def test_a_preview_s_costs_the_previews_alone(starter, world, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    own = (*OFTEN, "preview.every=2")
    starter.finish("train/lora.py", *arguments(world, whole, *own))
    # Two pictures of the base, then the second of those after two steps.
    oom = Fault(at=PREVIEW, call=4, do="oom")
    said = starter.finish("train/lora.py", *arguments(world, output, *own), faults=[oom])
    assert "warning: no previews of step-00000002, out of memory: " in said
    assert "preview.resolution needs less; preview.every=0 does without" in said
    found = sorted(path.name for path in (output / "previews").iterdir())
    assert found == ["base", "step-00000004", "step-00000006"]
    same_end(output, whole)
