"""Case 6: every checkpoint is damaged -> the run ends with code 1 and names them all; it never
starts at step 0 again, and changes nothing."""

import shutil

from tests.faults.checkpointed import flip
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "a run none of whose checkpoints is intact does not begin",
        "train/checkpoint.py",
        "        if damage:\n            raise DamagedCheckpoint(",
        "        if False:\n            raise DamagedCheckpoint(",
    ),
]


def test_a_run_without_an_intact_checkpoint_does_not_start_over(starter, world, tmp_path):
    run = tmp_path / "run"
    settings = arguments(world, run, "preview.every=0")
    starter.finish("train/lora.py", *settings)
    shutil.rmtree(run / "adapter")
    damaged = ("step-00000004/model.safetensors", "step-00000006/optimizer.safetensors")
    for name in damaged:
        flip(run / "checkpoints" / name)
    files = [*(run / "checkpoints").rglob("*.*"), run / "metrics.jsonl"]
    before = {file: file.read_bytes() for file in files if file.is_file()}

    said = starter.finish("train/lora.py", *settings, code=1)
    assert "every checkpoint in" in said and all(name in said for name in damaged)
    assert "Traceback" not in said and not (run / "adapter").exists()
    assert {file: file.read_bytes() for file in before} == before

    said = starter.finish("train/lora.py", *settings, code=1, processes=2)
    assert "every checkpoint in" in said and not (run / "adapter").exists()
