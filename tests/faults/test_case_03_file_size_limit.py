"""Case 3: a file may not become as large as a checkpoint's -> as where the disk is full: the run
ends with what to do, the checkpoints before are intact, and without the limit it goes on."""

import re
import resource

from tests.faults.checkpointed import left, steps
from tests.faults.injected import Fault
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "what the system did not take at once is written again",
        "train/checkpoint_files.py",
        "    while rest:\n        rest = rest[file.write(rest) :]",
        "    file.write(rest)",
    ),
    Removal(
        "what did not fit is removed",
        "train/checkpoint.py",
        "            with suppress(OSError):\n                self._clean()\n",
        "",
    ),
]


def test_a_limit_of_file_sizes_costs_nothing_but_the_last_steps(starter, world, tmp_path):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    settings = arguments(world, run, "preview.every=0")
    started = Fault(at="train.checkpoint:Checkpoints._prune", call=2, do="kill")
    starter.start("train/lora.py", *settings, faults=[started]).wait()
    assert steps(checkpoints) == [2, 4]
    largest = (checkpoints / "step-00000004/optimizer.safetensors").stat().st_size
    limits = {resource.RLIMIT_FSIZE: (largest - 5000, resource.RLIM_INFINITY)}
    said = starter.finish("train/lora.py", *settings, limits=limits, code=1)
    assert re.search(r"step 6 could not be written to .*File too large.*step 4 is intact", said)
    assert "ulimit -f" in said and "Traceback" not in said
    assert steps(checkpoints) == [2, 4] and left(checkpoints) == ""
    assert not (run / "adapter").exists()
    starter.finish("train/lora.py", *settings)
    assert steps(checkpoints) == [4, 6]
