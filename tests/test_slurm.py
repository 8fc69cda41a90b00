"""The templates of scripts/slurm, with stand-ins for SLURM and for what they train."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm_stand_ins import ROOT, Slurm, directives

TEMPLATES = sorted(path.name for path in (ROOT / "scripts/slurm").glob("*.sbatch"))
SINGLE = [name for name in TEMPLATES if name != "array.sbatch"]  # which take an entry themselves
# In the place of Python: notes what it is told, tells what it was told to, ends as told.
TRAINS = """#!/usr/bin/env bash
here="$(dirname "$0")"
told="$(printf '%s|' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$MASTER_ADDR" "$MASTER_PORT" "$@")"
echo "$told" >>"$here/told" # in one piece: another task may be at it
if [ -f "$here/waits" ]; then
    trap 'echo "$RANK" >>"$here/heard"; exit 143' TERM
    while :; do sleep 0.05; done
fi
exit "$(cat "$here/code")"
"""


class Trained:
    """A job whose training ends with the code that it is given."""

    def __init__(self, folder: Path, *, tasks: int = 1) -> None:
        self.slurm = Slurm(folder / "slurm", tasks=tasks)
        self.python, self.output = folder / "python", folder / "run of mine"
        self.python.write_text(TRAINS)
        self.python.chmod(0o755)

    def file(self, name: str) -> Path:
        return self.python.with_name(name)

    def submit(self, *arguments: str, template: str = "single_node.sbatch"):
        arguments = arguments or ("train/lora.py", f"output={self.output}")
        return self.slurm.submit(template, *arguments, python=str(self.python))

    def end(self, code: int, *arguments: str, step: int | None = None, **options: str) -> str:
        """Runs the job to its end, which is `code`, the run's; returns what it said."""
        self.file("code").write_text(str(code))
        if step is not None:
            self.output.mkdir(exist_ok=True)
            content = {"signal": "SIGUSR1", "exit_code": code, "step": step, "time": "2030"}
            (self.output / "interrupted.json").write_text(json.dumps(content) + "\n")
        job = self.submit(*arguments, **options)
        said, _ = job.communicate(timeout=30)
        assert job.returncode == code, said
        return said


@pytest.fixture
def job(tmp_path):
    return Trained(tmp_path)


@pytest.mark.parametrize("template", [*TEMPLATES, "train.sh"])
def test_templates_are_valid_shell(template):
    file = str(ROOT / "scripts/slurm" / template)
    subprocess.run(["bash", "-n", file], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, "--shell=bash", "--exclude=SC1091", file], check=True)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_ask_for_what_an_interruption_needs(template):
    asked = directives(template)
    # To the training processes, not to the shell (B:).
    assert asked["signal"].startswith("USR1@") and int(asked["signal"][5:]) >= 120
    assert "requeue" in asked and asked["open-mode"] == "append"
    # All of a node's GPUs are seen by each of its tasks.
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert not {"gpus-per-task", "gpu-bind"} & asked.keys()


@pytest.mark.parametrize("template", SINGLE)
def test_each_task_is_told_its_place(tmp_path, template):
    job = Trained(tmp_path, tasks=2)
    words = ("train/lora.py", "data.caption=a cat: *", f"output={job.output}")
    job.end(0, *words, template=template)
    told = sorted(line.split("|")[:-1] for line in job.file("told").read_text().splitlines())
    assert told == [[rank, rank, "2", "127.0.0.1", "24321", *words] for rank in "01"]
    assert "--kill-on-bad-exit=0" in job.slurm.options and "--wait=120" in job.slurm.options


def test_a_task_of_an_array_runs_its_line(job, monkeypatch):
    lines = [f"train/lora.py 'data.caption=a cat: *' 'output={job.output}' seed={n}" for n in "01"]
    job.file("runs.txt").write_text("\n".join(lines) + "\n")
    arguments = (str(job.file("runs.txt")),)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    job.end(138, *arguments, step=5, template="array.sbatch")
    told = job.file("told").read_text().splitlines()[0].split("|")
    assert told[5:-1] == [
        "train/lora.py",
        "data.caption=a cat: *",
        f"output={job.output}",
        "seed=1",
    ]
    assert job.slurm.asked() == ["requeue 4321"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert "no line for task 2" in job.end(2, *arguments, template="array.sbatch")


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137])
def test_only_what_was_interrupted_is_put_back(job, code):
    job.end(code, step=5)
    assert job.slurm.asked() == []


def test_what_saved_before_its_time_was_up_is_put_back(job):
    assert "step 5 is saved: back into the queue" in job.end(138, step=5)
    assert job.slurm.asked() == ["requeue 4321"]


def test_what_was_preempted_is_put_back_and_what_was_cancelled_is_not(job):
    job.end(143, step=5)
    assert job.slurm.asked() == []
    job.slurm.preempt()
    job.end(143, step=5)
    assert job.slurm.asked() == ["requeue 4321"]


def test_a_job_that_makes_no_progress_is_not_put_back_for_ever(job):
    steps = [5, 9, 9, 9, 12, 12, 12, 12]
    for step in steps:
        job.end(138, step=step)
    assert len(job.slurm.asked()) == len(steps)
    assert "without a step done (the last is 12): not put back" in job.end(138, step=12)
    assert len(job.slurm.asked()) == len(steps)
    job.end(138, step=13)  # submitted again by hand
    assert len(job.slurm.asked()) == len(steps) + 1
    job.end(0)
    assert not (job.output / "requeue.txt").exists()


def test_nor_one_that_never_saves(job):
    for _ in range(4):
        job.end(138)
    assert len(job.slurm.asked()) == 3


def test_the_shell_outlives_the_signals(tmp_path):
    job = Trained(tmp_path, tasks=2)
    job.slurm.preempt()
    job.file("waits").touch()
    batch = job.submit()
    deadline = time.monotonic() + 20
    told = job.file("told")
    while not told.exists() or told.read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        batch.send_signal(number)
    time.sleep(0.3)
    assert batch.poll() is None
    os.kill(job.slurm.srun(), signal.SIGTERM)
    said, _ = batch.communicate(timeout=20)
    assert batch.returncode == 143, said
    assert sorted(job.file("heard").read_text().split()) == ["0", "1"]
    assert job.slurm.asked() == ["requeue 4321"]


@pytest.mark.parametrize(
    "arguments", [["train/lora.py"], ["output=run"], ["train/none.py", "output=run"]]
)
def test_what_cannot_be_trained_is_a_mistake(job, arguments):
    assert "usage: sbatch scripts/slurm/" in job.end(2, *arguments)
    assert not job.file("told").exists()


def test_a_missing_python_is_a_mistake_too(job):
    job.python.unlink()
    batch = job.submit()
    said, _ = batch.communicate(timeout=20)
    assert batch.returncode == 2 and "make setup" in said
