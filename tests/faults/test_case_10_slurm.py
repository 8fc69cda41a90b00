"""Case 10: SLURM says through its template that the time is nearly up (SIGUSR1) -> one checkpoint,
a distinct exit code, the job back in the queue once; and its next start ends in the same bits as a
run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.faults.processes import Starter
from tests.faults.removals import Removal
from tests.faults.wandb_server import eventually
from tests.runs import arguments
from tests.slurm_stand_ins import Slurm
from train.tracking import read_metrics

WITHOUT = [
    Removal(
        "what was interrupted is put back into the queue",
        "scripts/slurm/train.sh",
        "    138) requeue ;;",
        "    138) ;;",
    ),
    Removal(
        "the batch shell outlives the signal",
        "scripts/slurm/train.sh",
        "trap : TERM USR1",
        ":",
    ),
    Removal(
        "each task is told its place",
        "scripts/slurm/train.sh",
        'RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"',
        "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1",
    ),
    Removal(
        "a run listens to SIGUSR1",
        "train/stopping.py",
        "SIGNALS = (signal.SIGTERM, signal.SIGUSR1,",
        "SIGNALS = (signal.SIGTERM,",
    ),
]
STEPS = 60

pytestmark = pytest.mark.slow


def command(world: Path, output: Path) -> list[str]:
    lasting = (f"train.steps={STEPS}", "checkpoint.every=1000", "preview.every=0", "data.workers=1")
    return ["train/lora.py", *arguments(world, output, *lasting)]


def weights(output: Path) -> bytes:
    return (output / "adapter/pytorch_lora_weights.safetensors").read_bytes()


def test_a_job_whose_time_is_up_saves_and_goes_on(
    starter: Starter, world: Path, tmp_path: Path
) -> None:
    slurm, output = Slurm(tmp_path / "slurm", tasks=2), tmp_path / "run"
    job = slurm.submit("single_node.sbatch", *command(world, output))
    eventually(lambda: len(read_metrics(output / "metrics.jsonl")) >= 2, 120)
    srun = slurm.srun()
    assert srun is not None
    job.send_signal(signal.SIGUSR1)
    os.kill(srun, signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 138, said
    (saved,) = (output / "checkpoints").glob("step-*")
    told = json.loads((output / "interrupted.json").read_text())
    assert saved.name == f"step-{told['step']:08d}" and 2 <= told["step"] < STEPS
    assert (told["signal"], told["exit_code"]) == ("SIGUSR1", 138)
    assert slurm.asked() == ["requeue 4321"]

    again = slurm.submit("single_node.sbatch", *command(world, output), restarts=1)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert slurm.asked() == ["requeue 4321"] and not (output / "interrupted.json").exists()
    steps = [line["step"] for line in read_metrics(output / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))

    starter.finish(*command(world, tmp_path / "whole"), processes=2)
    assert weights(output) == weights(tmp_path / "whole")
