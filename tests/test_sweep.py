"""scripts/sweep.py with a stand-in for what it trains, and the files of configs/sweeps."""

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from scripts import sweep as entry
from scripts import sweep_launching, sweep_ranking, sweeping
from tests.slurm_stand_ins import ROOT, Slurm
from train.config import LoraRun, RunFailed, UserError, load
from train.tracking_config import TrackingConfig

# In the place of an entry: notes what it is told, logs a loss that its arguments make, ends.
TRAINS = """
import json, os, sys, time
from pathlib import Path

told = dict(word.split("=", 1) for word in sys.argv[1:] if not word.startswith("--"))
output = Path(told["output"])
output.mkdir(parents=True, exist_ok=True)
told["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES")
with (output / "told.jsonl").open("a") as file:
    print(json.dumps(told), file=file)
if told.get("waits"):
    (output / "waiting").touch()
    time.sleep(60)
if told["lora.rank"] == told.get("fails"):
    (output / "metrics.jsonl").write_text('{"step": 0, "validation/loss": 0.001}\\n')
    sys.exit("no memory")
best = 1 / int(told["lora.rank"]) + 0.01 * int(told.get("seed", 0))
with (output / "metrics.jsonl").open("w") as file:
    for step, loss in ((0, 0.001), (10, best), (20, best + 1)):
        line = {"step": step, "validation/loss": loss, "validation/loss_se": 0.5}
        print(json.dumps(line), file=file)
(output / "adapter").mkdir(exist_ok=True)
"""


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep's file with what is given beside entry and output."""
    (tmp_path / "trains.py").write_text(TRAINS)

    def write(**content):
        content = {
            "entry": str(tmp_path / "trains.py"),
            "output": str(tmp_path / "ranks"),
            "grid": {"lora.rank": [4, 16]},
        } | content
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        return f"sweep={tmp_path / 'sweep.yaml'}"

    return write


def told(folder: Path):
    """What each start of a run was told."""
    file = folder / "told.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def ranking(output: Path):
    return json.loads((output / "sweep.json").read_text())["ranking"]


def test_a_run_for_each_setting_and_seed_told_apart_by_folder_and_tags(sweep, tmp_path):
    entry.main([sweep(seeds=[0, 1], arguments=["--config=a.yaml"]), "data.path=my pictures"])
    folders = sorted(path.name for path in (tmp_path / "ranks").glob("rank*"))
    assert folders == [f"rank-{rank}_seed-{seed}" for rank in (16, 4) for seed in (0, 1)]
    (one,) = told(tmp_path / "ranks/rank-16_seed-1")
    assert (one["lora.rank"], one["seed"], one["data.path"]) == ("16", "1", "my pictures")
    assert one["tracking.group"] == "ranks"
    given = [f"{key}={one[f'tracking.{key}']}" for key in ("group", "tags")]
    assert load(TrackingConfig, given).tags == ["rank-16", "seed-1"]


def test_settings_are_ranked_by_their_mean_over_seeds(sweep, tmp_path, capsys):
    entry.main([sweep(seeds=[0, 1, 2])])
    first, second = ranking(tmp_path / "ranks")
    assert first["values"] == {"lora.rank": 16} and first["seeds"] == 3
    values = [1 / 16 + 0.01 * seed for seed in range(3)]
    assert first["mean"] == pytest.approx(statistics.fmean(values))
    assert first["spread"] == pytest.approx(statistics.stdev(values))
    assert first["steps"] == [10, 10, 10]  # the best of training, not the base's
    said = capsys.readouterr().out
    assert "1.  16    0.0725           0.01  3/3   10, 10, 10" in said
    assert second["values"] == {"lora.rank": 4}


def test_of_one_run_the_spread_is_its_own_standard_error(sweep, tmp_path):
    entry.main([sweep()])
    assert [one["spread"] for one in ranking(tmp_path / "ranks")] == [0.5, 0.5]


def test_what_failed_keeps_nothing_up_and_is_tried_again_alone(sweep, tmp_path, capsys):
    given = sweep(grid={"lora.rank": [4, 16, 64]})
    with pytest.raises(RunFailed, match="1 of 3 runs are not done"):
        entry.main([given, "fails=16"])
    log = tmp_path / "ranks/logs/rank-16.log"
    said = capsys.readouterr().out
    assert f"2/3  rank-16: failed with exit code 1, see {log}" in said
    assert "\n    16    (not done)            0/1\n" in said  # and not with its base's loss
    assert "no memory" in log.read_text()
    assert [one["seeds"] for one in ranking(tmp_path / "ranks")] == [1, 1, 0]
    entry.main([given])
    assert [len(told(tmp_path / f"ranks/rank-{rank}")) for rank in (4, 16, 64)] == [1, 2, 1]


def test_runs_at_a_time_get_a_gpu_each(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    entry.main([sweep(seeds=[0, 1]), "parallel=2"])
    gpus = {one["gpu"] for path in (tmp_path / "ranks").glob("rank*") for one in told(path)}
    assert gpus == {"4", "5"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_the_signal_that_ends_a_sweep_ends_its_runs_and_starts_no_more(sweep, tmp_path, number):
    command = [sys.executable, "scripts/sweep.py", sweep(), "waits=1"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ranks/rank-4/waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(number)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 1 and "rank-4: interrupted" in said
    assert not (tmp_path / "ranks/rank-16").exists()


def test_a_run_that_is_just_being_started_hears_the_signal_too(sweep, tmp_path):
    local = sweep_launching.Local([], tmp_path / "logs", parallel=1)

    class Running(set):
        def add(self, process):
            os.kill(os.getpid(), signal.SIGTERM)
            while not local._stopping:
                time.sleep(0.01)
            super().add(process)

    local._running = Running()
    runs = sweeping.runs_of(sweeping.read(Path(sweep().partition("=")[2])), ["waits=1"])
    before = time.monotonic()
    assert local.run(runs) == {"rank-4": 143}
    assert time.monotonic() - before < 20


def test_a_dry_run_says_what_would_be_done(sweep, tmp_path, capsys):
    entry.main([sweep(), "dry_run=true", "data.caption=a cat: *"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "data.caption=a cat: *" in shlex.split(lines[0])
    assert not (tmp_path / "ranks").exists()


def test_settings_drawn_at_random_are_the_same_every_time(sweep):
    rate = {"low": 1e-5, "high": 1e-3, "log": True}
    drawn = {"optim.learning_rate": rate, "lora.rank": {"choices": [4, 8]}}

    def values(samples):
        given = sweep(grid={}, random={"samples": samples, "ranges": drawn})
        return list(sweeping.settings(sweeping.read(Path(given.partition("=")[2]))))

    many = values(200)
    assert values(20) == many[:20]
    assert all(1e-5 <= one["optim.learning_rate"] <= 1e-3 for one in many)
    below = sum(one["optim.learning_rate"] < 1e-4 for one in many)
    assert 70 < below < 130


OURS = {"entry": "train/lora.py"}


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ({"grid": {}}, [], "needs grid, random or seeds"),
        ({"grid": {"lora.rank": []}}, [], "lora.rank has no values"),
        ({"grid": {"lora.rank": [4, 4]}}, [], "two settings of the sweep are called rank-4"),
        ({}, ["output=elsewhere"], "output is given to each run by the sweep"),
        (OURS | {"grid": {"lora.rnk": [4]}}, [], "'lora.rnk'; did you mean 'lora.rank'"),
        (OURS, ["dry_run=true", "train.step=1"], "did you mean 'train.steps'"),
        (OURS, ["paralel=2"], "for 'paralel', 'parallel' is a key of the sweep itself"),
        ({"entry": "train/none.py"}, [], "start this in the repository's folder"),
        ({"random": {"ranges": {"seed": {"low": 0, "high": 1, "log": True}}}}, [], "above 0"),
    ],
)
def test_mistakes_are_told(sweep, tmp_path, monkeypatch, content, given, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        entry.main([sweep(**content), *given])
    assert not (tmp_path / "ranks").exists()


def test_values_are_told_apart_and_given_whole(sweep):
    values = [-0.1, 0.1, 0.123456789, 1.0]
    found = sweeping.read(Path(sweep(grid={"optim.weight": values}).partition("=")[2]))
    runs = sweeping.runs_of(found, [])
    names = ["weight--0.1", "weight-0.1", "weight-0.123456789", "weight-1"]
    assert [run.name for run in runs] == names
    assert "optim.weight=0.123456789" in runs[2].words


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_a_sweep_ends_with_its_ranking_for_programs(sweep, tmp_path, flag):
    command = [sys.executable, "scripts/sweep.py", flag, sweep(grid={"lora.rank": [4]})]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = str(tmp_path / "ranks/sweep.json")
    if flag == "--quiet":
        assert said == f"{result}\n"
    else:
        last = json.loads(said.splitlines()[-1])
        assert (last["event"], last["result"]) == ("done", result)
        assert last["ranking"] == ranking(tmp_path / "ranks")


# SLURM


def test_slurm_gets_one_array_and_each_task_its_line(sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/asked\necho 77\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    given = [sweep(), "launch=slurm", "parallel=3", "sbatch=[--time=1:00:00]", "data.path=a b"]
    entry.main(given)
    asked = (tmp_path / "asked").read_text().splitlines()
    lines = tmp_path / "ranks/runs-1.txt"
    entry.main([word for word in given if not word.startswith("parallel")])
    assert (tmp_path / "asked").read_text().splitlines()[1] == "--array=0-1"
    assert asked[1:] == [
        *("--array=0-1%3", "--time=1:00:00"),
        *("scripts/slurm/array.sbatch", str(lines)),
    ]
    assert "SLURM job 77: 2 tasks" in capsys.readouterr().out

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    slurm = Slurm(tmp_path / "slurm")
    said, _ = slurm.submit("array.sbatch", str(lines)).communicate(timeout=30)
    (one,) = told(tmp_path / "ranks/rank-16")
    assert (one["lora.rank"], one["data.path"]) == ("16", "a b"), said
    assert not (tmp_path / "ranks/rank-4").exists()

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    job = Slurm(tmp_path / "beyond").submit("array.sbatch", str(lines))
    assert "has no line for task 2" in job.communicate(timeout=30)[0] and job.returncode == 2
    entry.main(given)  # of what is left
    assert len((tmp_path / "ranks/runs-3.txt").read_text().splitlines()) == 1


def test_without_slurm_it_is_said(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        entry.main([sweep(), "launch=slurm"])


# The files of configs/sweeps


@pytest.mark.parametrize("name", ["rank", "random"])
def test_the_shipped_sweeps_have_keys_that_are_there(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = sweeping.read(Path(f"configs/sweeps/{name}.yaml"))
    runs = sweeping.runs_of(found, ["data.path=pictures"])
    config = load(LoraRun, list(runs[-1].words)[1:])
    assert config.output == found.output / runs[-1].name
    assert config.lora.rank == runs[-1].values["lora.rank"]
    assert config.tracking.group == name


def test_wandbs_agent_gives_each_run_a_folder_of_its_own(tmp_path, monkeypatch):
    """As its agent builds the command, with the id that the agent then sets."""
    file = yaml.safe_load((ROOT / "configs/sweeps/lora_wandb.yaml").read_text())
    given = {"lora.rank": {"value": 8}, "optim.learning_rate": {"value": 2e-05}}
    parts = create_sweep_command_args({"args": given})
    parts["program"] = [file["program"]]
    words = []
    for word in create_sweep_command(list(file["command"])):
        known = word.startswith("${") and word.endswith("}")
        words += parts[word[2:-1]] if known else [word]
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "x1y2"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    program, *arguments = done.stdout.splitlines()
    assert (ROOT / program).is_file()
    monkeypatch.chdir(ROOT)
    config = load(LoraRun, arguments)
    assert (str(config.output), config.lora.rank) == ("runs/lora-sweep/x1y2", 8)
    assert config.optim.learning_rate == 2e-5 and config.tracking.trackers == ["wandb"]
    assert file["metric"]["name"] == "validation/loss"


def test_a_score_of_an_evaluation_can_rank_too(tmp_path):
    def run(seed, **value):
        folder = tmp_path / str(seed)
        for name in ("eval", "adapter"):
            (folder / name).mkdir(parents=True)
        scores = {"clip_t": {"values": {"finetuned": value}}}
        (folder / "eval/metrics.json").write_text(json.dumps({"scores": scores}))
        return sweeping.SweepRun(str(seed), folder, {"lora.rank": 4}, seed, [])

    runs = [run(0, value=0.3, low=0.2, high=0.4), run(1, value=None), run(2, value=math.nan)]
    (one,) = sweep_ranking.rank(runs, "clip_t", "more")
    assert one.mean == 0.3 and one.spread == pytest.approx(0.2 / 3.92) and one.seeds == 1


def test_gpus_are_those_that_the_sweep_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep_launching.visible_gpus() == []
