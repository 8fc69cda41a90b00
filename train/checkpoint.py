"""Checkpoints that are complete or absent: safetensors and JSON, written aside, synced, renamed,
then pruned.

A checkpoint is a folder `step-00000100` with `model.safetensors` (the trainable parameters by
name), `optimizer.safetensors` (its state by parameter name) and `manifest.json` (step, sizes,
hashes, scalars). The learning rate, the data position and all randomness are functions of the step
and need no state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.config import RunFailed

FORMAT = 1
_TEMPORARY = ".writing-"
_FILES = ("model.safetensors", "optimizer.safetensors")


class DamagedCheckpoint(RunFailed):
    """A checkpoint whose files do not match its manifest; names the file."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them kept."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **facts: Any
    ) -> None:
        """Writes the state after `step` optimizer steps. Called by one process.

        Raises RunFailed, and leaves the older checkpoints, where a parameter is not finite.
        """
        state = trainable_state(model)
        self._refuse_non_finite(step, state)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        temporary = self.folder / f"{_TEMPORARY}{self.path(step).name}"
        temporary.mkdir()
        tensors, scalars = optimizer_state(model, optimizer)
        save_file(state, temporary / "model.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        files = {path.name: _measure(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files, "optimizer": scalars, **facts}
        write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            sync(path)
        shutil.rmtree(self.path(step), ignore_errors=True)
        os.replace(temporary, self.path(step))
        sync(self.folder)
        self._prune()

    def _refuse_non_finite(self, step: int, state: dict[str, Tensor]) -> None:
        broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
        if broken:
            kept = self.steps()
            last = f"the checkpoint of step {kept[-1]} is intact" if kept else "none was saved yet"
            raise RunFailed(
                f"training diverged before step {step}: {broken[0]} is not finite; {last}. Lower "
                "optim.learning_rate, or use train.mixed_precision=bf16 or no, in a new output="
            )

    def facts(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint."""
        return dict(json.loads((self.path(step) / "manifest.json").read_text(encoding="utf-8")))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Loads the newest intact checkpoint; returns its step, 0 if there is none at all.

        A damaged one is named and passed over. Raises DamagedCheckpoint if none is intact: a run
        with checkpoints never restarts silently at 0.
        """
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                manifest = verify(self.path(step))
            except DamagedCheckpoint as error:
                damage.append(str(error))
                print(f"warning: {error}; falling back to the checkpoint before it", flush=True)
                continue
            self._load(self.path(step), manifest, model, optimizer)
            return step
        if damage:
            raise DamagedCheckpoint(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(damage)}); "
                "restore one from a backup, or start afresh with another `output`"
            )
        return 0

    def _load(
        self,
        path: Path,
        manifest: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        load_trainable(model, load_file(path / "model.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        load_optimizer(model, optimizer, tensors, manifest["optimizer"])

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step))

    def _clean(self) -> None:
        """Removes what a killed writer left."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the sizes and hashes it lists; else
    DamagedCheckpoint."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        listed = dict(manifest["files"])
        _ = manifest["step"], manifest["optimizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{path / 'manifest.json'} is missing or unreadable ({error})"
        ) from None
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path} has format {manifest.get('format')}, expected {FORMAT}")
    for name in sorted({*_FILES, *listed}):
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if _measure(file) != listed.get(name):
            raise DamagedCheckpoint(f"{file} is damaged: size or hash differ from the manifest")
    return manifest


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies saved values into the trainable parameters, whose dtype (fp32) stays."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if wanted.keys() != state.keys():
        odd = sorted(wanted.keys() ^ state.keys())[:3]
        raise DamagedCheckpoint(
            f"the checkpoint holds other parameters than the model: {', '.join(odd)}"
        )
    for name, parameter in wanted.items():
        parameter.copy_(state[name])


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state by parameter name: tensors as `name/key`, scalars and group settings as
    JSON."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            target = f"{names[parameter]}/{key}"
            if isinstance(value, Tensor):
                # A copy: bitsandbytes shares one table between all parameters' states.
                tensors[target] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars[target] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, {"state": scalars, "groups": groups}


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    """The inverse of `optimizer_state`. Moments stay in their own dtype and go to the parameter's
    device."""
    parameters = dict(model.named_parameters())
    for target, value in {**tensors, **scalars["state"]}.items():
        name, _, key = target.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.dim() > 0:
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
    for group, saved in zip(optimizer.param_groups, scalars["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
