"""train/full.py under FSDP2 and under DeepSpeed, on two processes without GPUs."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.runs import ROOT, arguments, finish, launch, make_world
from train import full, lora, sharding
from train.config import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def full_run(world, output, *overrides):
    """The arguments of a tiny run of train/full.py, previews and all."""
    tiny, *rest = arguments(world, output, "optim.learning_rate=1e-3", *overrides)
    values = yaml.safe_load(open(tiny.removeprefix("--config="), encoding="utf-8"))
    del values["lora"]
    output.parent.mkdir(parents=True, exist_ok=True)
    config = output.parent / "full.yaml"
    config.write_text(yaml.safe_dump(values))
    return [f"--config={config}", *rest]


NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
SHARDED = [
    pytest.param("fsdp", id="fsdp"),
    pytest.param("zero2", id="deepspeed", marks=NEEDS_DEEPSPEED),
    pytest.param("zero3", id="deepspeed_zero3", marks=NEEDS_DEEPSPEED),
]


def sharded(by, *args):
    script = "tests/fsdp_on_cpu.py" if by == "fsdp" else "tests/deepspeed_on_cpu.py"
    stage = ["--zero-stage=3"] if by == "zero3" else []
    return launch(script, *stage, "train/full.py", *args, processes=2)


def tensors(run):
    """Every tensor that a run leaves, by file and name."""
    files = [f for f in sorted(run.rglob("*.safetensors")) if "vae" not in f.parts]
    return {(str(f.relative_to(run)), k): v for f in files for k, v in load_file(f).items()}


def distance(run, other):
    a, b = tensors(run), tensors(other)
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max().item() for key in a)


def pictures(run):
    return {p.relative_to(run): p.read_bytes() for p in (run / "previews").rglob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("by", SHARDED)
def test_sharded_training_is_training_and_resumes_bit_for_bit(world, tmp_path, by):
    whole, split, resumed = (tmp_path / name for name in ("whole", "split", "resumed"))
    settings = (
        "full.text_encoder=true",
        *(() if by == "zero3" else ("train.ema_decay=0.9",)),
        "train.micro_batch_size=1",
        "optim.eps=1e-6",  # rounding is not to decide which way a weight without gradient goes
    )
    finish(launch("train/full.py", *full_run(world, whole, *settings), processes=2))
    finish(sharded(by, *full_run(world, split, *settings)))
    assert distance(whole, split) < 1e-5
    assert pictures(whole).keys() == pictures(split).keys()

    shutil.copytree(split, resumed)
    shutil.rmtree(resumed / "full")
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    shutil.rmtree(resumed / "previews/step-00000006")
    finish(sharded(by, *full_run(world, resumed, *settings)))
    assert distance(split, resumed) == 0
    assert pictures(split) == pictures(resumed)

    # Its checkpoint is anyone's.
    shutil.rmtree(resumed / "full")
    shutil.rmtree(resumed / "checkpoints/step-00000006")
    finish(launch("train/full.py", *full_run(world, resumed, *settings)))
    assert distance(split, resumed) < 1e-5


SCHEDULE_FREE = ("optim.name=schedule_free", "optim.schedule=constant")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "settings"),
    [
        pytest.param(*SHARDED[0].values, SCHEDULE_FREE, id="fsdp-schedule_free"),
        *(pytest.param(*one.values, (), id=one.id, marks=one.marks) for one in SHARDED[1:]),
    ],
)
def test_the_best_under_bf16(world, tmp_path, by, settings):
    """The weights used are gathered too; a validation leaves nothing behind."""
    settings = (
        *settings,
        "train.mixed_precision=bf16",
        "train.gradient_checkpointing=true",
        "validation.every=2",
        "validation.images=2",
        "validation.use_best=true",
        f"evaluation.path={world / 'pictures'}",
    )
    losses = {}
    for name in ("whole", "split"):
        run = full_run(world, tmp_path / name, *settings)
        finish(sharded(by, *run) if name == "split" else launch("train/full.py", *run, processes=2))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [line for line in map(yaml.safe_load, lines) if "loss" in line]
        weights = load_file(tmp_path / name / "checkpoints/step-00000006/model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    for ours, theirs in zip(losses["split"], losses["whole"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


# What is not sharded is left as it is


def test_a_plain_tensor_is_whole_and_a_plain_model_has_no_shards():
    model = nn.Linear(2, 2)
    assert not sharding.is_sharded(model)
    assert sharding.whole(model.weight) is model.weight
    sharding.fill(model.weight, torch.ones(2, 2))
    assert torch.equal(model.weight, torch.ones(2, 2))


# The launcher


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, (), "zero_stage: 2 or 3"),
        (DEEPSPEED, ("optim.name=adamw8bit",), "optim.name=adamw8bit.*DeepSpeed: use adamw"),
        (DEEPSPEED, ("train.mixed_precision=fp16",), "mixed_precision=fp16.*DeepSpeed: use.*bf16"),
        (FSDP | {"FSDP_VERSION": "1"}, (), "fsdp_version: 2"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, (), "efficient_loading: false"),
        (FSDP, ("optim.name=adamw8bit",), "optim.name=adamw8bit.*FSDP: use one of adamw"),
    ],
)
def test_what_cannot_be_sharded_is_said(
    world, tmp_path, monkeypatch, environment, settings, message
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        full.main(full_run(world, tmp_path / "run", *settings))


@pytest.mark.parametrize(("environment", "what"), [(FSDP, "FSDP"), (DEEPSPEED, "DeepSpeed")])
def test_adapters_are_not_sharded(world, tmp_path, monkeypatch, environment, what):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=f"{what} is for full.*multi_gpu.yaml"):
        lora.main(arguments(world, tmp_path / "run"))


def test_deepspeed_is_asked_for(world, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, value in DEEPSPEED.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=r"pip install 'sd-atelier\[deepspeed\]'"):
        full.main(full_run(world, tmp_path / "run"))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("fsdp_on_cpu", FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}),
        ("deepspeed_on_cpu", DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}),
    ],
)
def test_the_launcher_gives_its_processes_what_the_plan_asks_for(script, expected):
    script = f"from tests.{script} import launch_settings; print(launch_settings())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    settings = yaml.safe_load(done.stdout.strip().splitlines()[-1])
    assert {key: settings[key] for key in expected} == expected
