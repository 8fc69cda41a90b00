"""configs/accelerate: each is read by Accelerate, and its launcher tells an entry what the plan
takes."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from tests.runs import ROOT
from tests.test_sharding import full_run, make_world
from train import full, lora
from train.config import UserError

FILES = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
KINDS = {
    "cpu": "NO",
    "single_gpu": "NO",
    "multi_gpu": "MULTI_GPU",
    "fsdp": "FSDP",
    "deepspeed": "DEEPSPEED",
    "deepspeed_zero3": "DEEPSPEED",
}
# What the launcher would give the processes of each, printed by a script in their place.
ASK = """
import sys
from accelerate.commands import launch
from accelerate.utils import launch as settings

arguments = launch.launch_command_parser().parse_args(["--config_file", sys.argv[1], "entry.py"])
arguments, _, _ = launch._validate_launch_command(arguments)
kind = sys.argv[2]
if kind == "DEEPSPEED":
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, found = settings.prepare_deepspeed_cmd_env(arguments)
elif kind == "NO":
    _, found = settings.prepare_simple_launcher_cmd_env(arguments)
else:
    found = settings.prepare_multi_gpu_env(arguments)
print(repr({k: v for k, v in found.items() if k.startswith(("ACCEL", "FSDP"))}))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def settings():
    """By name, all asked for at once: each start of the launcher takes seconds."""
    starts = {
        file.stem: subprocess.Popen(
            [sys.executable, "-c", ASK, str(file), KINDS[file.stem]],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for file in FILES
    }
    found = {}
    for name, process in starts.items():
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {error}"
        found[name] = yaml.safe_load(out.strip().splitlines()[-1])
    return found


def test_all_kinds_are_there():
    assert {file.stem for file in FILES} == KINDS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_says_how_it_is_launched(file):
    from accelerate.commands.config.config_args import load_config_from_file

    first = file.read_text("utf-8").splitlines()[0]
    words = shlex.split(first.removeprefix("# "))
    assert words[:3] == ["accelerate", "launch", "--config_file"]
    assert words[3] == str(file.relative_to(ROOT)) and (ROOT / words[-1]).is_file()
    read = load_config_from_file(str(file))
    assert read.distributed_type.value == KINDS[file.stem]
    assert read.mixed_precision == "no" and read.num_machines == 1  # the run's own decides


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_takes_what_the_launcher_tells(
    world, tmp_path, monkeypatch, settings, name, capsys
):
    """Fails where a configuration asks for what train/plan.py refuses."""
    monkeypatch.setattr("train.plan.require_deepspeed", lambda: None)
    for key, value in settings[name].items():
        monkeypatch.setenv(key, value)
    full.main(full_run(world, tmp_path / "run", "dry_run=true"))
    assert "nothing trained" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "deepspeed_zero3"])
def test_what_splits_weights_or_states_is_for_full_fine_tuning(
    world, tmp_path, monkeypatch, settings, name
):
    from tests.runs import arguments

    for key, value in settings[name].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="is for full fine-tuning"):
        lora.main(arguments(world, tmp_path / "run", "dry_run=true"))


def test_stage_3_has_its_own_limits(world, tmp_path, monkeypatch, settings):
    for key, value in settings["deepspeed_zero3"].items():
        monkeypatch.setenv(key, value)
    assert settings["deepspeed_zero3"]["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    with pytest.raises(UserError, match=r"train\.ema_decay=0\.9 .*fsdp\.yaml"):
        full.main(full_run(world, tmp_path / "run", "train.ema_decay=0.9"))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true")
    with pytest.raises(UserError, match="zero3_init_flag: false"):
        full.main(full_run(world, tmp_path / "run"))


def test_launchers_that_the_page_names_are_there():
    page = (ROOT / "docs/cluster.md").read_text("utf-8")
    named = set(re.findall(r"configs/accelerate/(\w+)\.yaml", page))
    assert {"multi_gpu", "fsdp", "deepspeed", "deepspeed_zero3"} <= named <= KINDS.keys()
