"""How far scripts/plan.py's prediction of peak memory is from what real runs take, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data import toy
from scripts.benchmarks.measuring import fresh
from train.config import ROOT, RunFailed
from train.resident import peak_resident

Results = dict[str, dict[str, Any]]

TOY = "data/assets/toy-base"
TARGET = 0.15  # largest error
_LOOK_SECONDS = 0.05


class Setting(NamedTuple):
    """One run: its entry, the configuration it starts from, and what is set besides."""

    method: str
    size: str
    """toy or full."""
    overrides: tuple[str, ...]


def _toy(method: str, *overrides: str) -> Setting:
    return Setting(method, "toy", overrides)


def _full(method: str, *overrides: str) -> Setting:
    return Setting(method, "full", overrides)


_SMALL = ("data.resolution=128", "train.batch_size=1")
_LOW = "train.mixed_precision=bf16"
_AGAIN = "train.gradient_checkpointing=true"
_MANY = "data.path=runs/toy-data/mosaic"  # more pictures than a batch has
SETTINGS: dict[str, Setting] = {
    "toy LoRA": _toy("lora"),
    "toy LoRA, batch 32": _toy("lora", "train.batch_size=32"),
    "toy LoRA, 32 in parts of 8": _toy("lora", "train.batch_size=32", "train.micro_batch_size=8"),
    "toy LoRA, batch 32, checkpointing": _toy("lora", "train.batch_size=32", _AGAIN),
    "toy LoRA, batch 32, bf16": _toy("lora", "train.batch_size=32", _LOW),
    "toy LoRA, 256 px, batch 16": _toy("lora", "data.resolution=256", "train.batch_size=16"),
    "toy LoRA, 512 px, batch 4": _toy("lora", "data.resolution=512", "train.batch_size=4"),
    "toy full": _toy("full"),
    "toy full, batch 32, Adafactor": _toy(
        "full", "train.batch_size=32", "train.ema_decay=null", "optim.name=adafactor"
    ),
    "toy full, batch 32, bf16": _toy("full", "train.batch_size=32", _LOW),
    "toy DreamBooth, batch 32": _toy("dreambooth", "train.batch_size=32", _MANY),
    "toy textual inversion, batch 32": _toy(
        "textual_inversion", "train.batch_size=32", _MANY, "textual_inversion.captions=style"
    ),
    "toy LoRA, previews at 512 px": _toy(
        "lora", "preview.every=2", "preview.steps=1", "preview.resolution=512"
    ),
    "full-size LoRA, 128 px": _full("lora", *_SMALL),
    "full-size LoRA, 256 px, batch 2, bf16, checkpointing": _full(
        "lora", "data.resolution=256", "train.batch_size=2", _LOW, _AGAIN
    ),
    "full-size LoRA, 256 px, batch 2": _full("lora", "data.resolution=256", "train.batch_size=2"),
    "full-size textual inversion, 256 px": _full(
        "textual_inversion",
        *("data.resolution=256", "train.batch_size=1", "textual_inversion.captions=style"),
    ),
    "full-size full, Adafactor, checkpointing": _full(
        "full",
        *_SMALL,
        _AGAIN,
        "optim.name=adafactor",
        "train.ema_decay=null",
        "checkpoint.asynchronous=false",
    ),
}


def measure(
    names: Sequence[str] = (), *, full_size: Path | None = None, scratch: Path | None = None
) -> Results:
    """Predicted and measured peak in MiB, and the error, of each setting by its name.

    names: of SETTINGS; default: all, those of the full size only where `full_size` is the folder
    that scripts/toy/full_size.py wrote.
    """
    results = {}
    for name in names or SETTINGS:
        setting = SETTINGS[name]
        if setting.size == "full" and full_size is None:
            continue
        model = TOY if setting.size == "toy" else str(full_size)
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=scratch) as folder:
            results[name] = one(setting, model, Path(folder))
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    return results


def one(setting: Setting, model: str, folder: Path) -> dict[str, Any]:
    """A run of two steps, predicted and measured."""
    if setting.size == "full":  # whose VAE takes seconds for a picture
        toy.write_pictures(folder / "pictures", 4, seed=0, square=True)
        few = [f"data.path={folder / 'pictures'}"]
    else:
        few = []
    arguments = [
        f"--config={ROOT}/configs/toy/{setting.method}.yaml",
        f"model.path={model}",
        f"output={folder / 'run'}",
        f"data.cache={folder / 'cache'}",
        *("train.steps=2", "optim.warmup_steps=0", "preview.every=0", "validation.every=0"),
        *("evaluation.path=null", "data.cache_batch_size=4"),
        *few,
        *setting.overrides,
    ]
    found = fresh(f"{__name__}:predicted", method=setting.method, arguments=arguments)
    peak = resident_peak([sys.executable, f"train/{setting.method}.py", *arguments])
    phases = {name: round(size / 2**20) for name, size in found["phases"]}
    most = max(phases, key=lambda name: phases[name])
    return {
        "predicted_mib": phases[most],
        "measured_mib": round(peak / 2**20),
        "error": round(phases[most] / (peak / 2**20) - 1, 4),
        "phase": most,
        "phases": phases,
    }


def predicted(method: str, arguments: list[str]) -> dict[str, Any]:
    """What scripts/plan.py says."""
    from scripts.planning import foreseen

    return {"phases": foreseen(method, arguments)}


def resident_peak(command: list[str]) -> int:
    """The most bytes that a process had in memory (VmHWM), pages of mapped files among them.

    Not what the system says of a child that has ended, which includes the process that started it.
    Raises RunFailed where the command fails.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_resident(process.pid))
            time.sleep(_LOOK_SECONDS)
        if process.returncode:
            said.seek(0)
            raise RunFailed(f"{' '.join(command)}: {said.read()[-2000:].decode(errors='replace')}")
    return peak


def table(results: Results) -> str:
    """The results as Markdown."""
    rows = [("run", "predicted, MiB", "measured, MiB", "error", "peak in"), ("---",) * 5]
    rows += [
        (
            name,
            f"{result['predicted_mib']:,}",
            f"{result['measured_mib']:,}",
            f"{result['error']:+.1%}",
            result["phase"],
        )
        for name, result in results.items()
    ]
    worst = max((abs(result["error"]) for result in results.values()), default=0.0)
    rows.append(("largest error", "", "", f"{worst:.1%}", f"target {TARGET:.0%}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
