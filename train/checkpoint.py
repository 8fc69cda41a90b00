"""Checkpoints that are complete or absent: safetensors and JSON, written aside, synced, renamed,
then pruned.

A checkpoint is a folder `step-00000100` with `model.safetensors` (the trainable parameters by
name), `optimizer.safetensors` (its state by parameter name), with a moving average
`averages.safetensors`, and `manifest.json` (step, sizes, hashes, scalars). The learning rate, the
data position and all randomness are functions of the step and need no state. Beside them
`best.json` tells which of them is kept for its held-out loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.averaging import Averages
from train.config import RunFailed
from train.sharding import fill, is_sharded, like, whole

FORMAT = 1
_TEMPORARY = ".writing-"
_FILES = ("model.safetensors", "optimizer.safetensors")
_BEST = "best.json"


class DamagedCheckpoint(RunFailed):
    """A checkpoint whose files do not match its manifest; names the file."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and the best.

    writes: whether this process writes them; one of several does.
    """

    def __init__(
        self, folder: Path, *, keep: int, writes: bool = True, asynchronous: bool = False
    ) -> None:
        self.folder, self.keep, self.writes = folder, keep, writes
        self._best: int | None = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: dict[str, Tensor] | None = None,
        **facts: Any,
    ) -> None:
        """Writes the state after `step` optimizer steps. Called by every process, for where the
        model is sharded all of them have a part.

        averages: what `Averages.state` gives. Raises RunFailed, and leaves the older checkpoints,
        where a parameter is not finite or the disk does not take it.
        """
        if not self.writes:
            if is_sharded(model):
                _gather_for_another(model, optimizer, averages or {})
            return
        state = trainable_state(model)
        self._refuse_non_finite(step, state)
        tensors, scalars = optimizer_state(model, optimizer)
        files = {"model": state, "optimizer": tensors}
        if averages:
            files["averages"] = {name: _on_cpu(tensor) for name, tensor in averages.items()}
        try:
            self._write(step, files, {"optimizer": scalars, **facts})
        except (OSError, SafetensorError) as error:
            self._clean()
            raise RunFailed(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}. "
                "Free space there; the same command then goes on from the checkpoint before it"
            ) from None
        self._prune(step)

    def _write(
        self, step: int, contents: dict[str, dict[str, Tensor]], facts: dict[str, Any]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        temporary = self.folder / f"{_TEMPORARY}{self.path(step).name}"
        temporary.mkdir()
        for name, tensors in contents.items():
            save_file(tensors, temporary / f"{name}.safetensors")
        files = {path.name: _measure(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files, **facts}
        write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            sync(path)
        shutil.rmtree(self.path(step), ignore_errors=True)
        os.replace(temporary, self.path(step))
        sync(self.folder)

    def mark_best(self, step: int | None, **facts: Any) -> None:
        """Keeps the checkpoint of `step`, which is there, until another is better; None keeps none.
        best.json, for whoever looks, has the facts too; nothing here reads it."""
        self._best = step
        if self.writes and step is None:
            (self.folder / _BEST).unlink(missing_ok=True)
        elif self.writes:
            self._write_best({"step": step, **facts})

    def _write_best(self, content: dict[str, Any]) -> None:
        temporary = self.folder / f"{_TEMPORARY}{_BEST}"
        write_synced(temporary, json.dumps(content) + "\n")
        os.replace(temporary, self.folder / _BEST)
        sync(self.folder)

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

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Averages | None = None,
    ) -> int:
        """Loads the newest intact checkpoint; returns its step, 0 if there is none at all.

        A damaged one is named and passed over. Raises DamagedCheckpoint if none is intact: a run
        with checkpoints never restarts silently at 0.
        """
        step = self.find()
        if step:
            self.load(step, model, optimizer, averages, verified=True)
        return step

    def wait(self) -> None: ...

    def close(self) -> None: ...

    def find(self) -> int:
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except DamagedCheckpoint as error:
                damage.append(str(error))
                print(f"warning: {error}; falling back to the checkpoint before it", flush=True)
                continue
            return step
        if damage:
            raise DamagedCheckpoint(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(damage)}); "
                "restore one from a backup, or start afresh with another `output`"
            )
        return 0

    def load(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Averages | None = None,
        verified: bool = False,
    ) -> None:
        """Loads the checkpoint of `step`. Raises DamagedCheckpoint."""
        self._load(self.path(step), verify(self.path(step)), model, optimizer, averages)

    def _load(
        self,
        path: Path,
        manifest: dict[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Averages | None,
    ) -> None:
        load_trainable(model, load_file(path / "model.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        load_optimizer(model, optimizer, tensors, manifest["optimizer"])
        if averages is not None:
            file = path / "averages.safetensors"
            averages.load(load_file(file) if file.exists() else {})

    def _prune(self, newest: int) -> None:
        """Leaves the `keep` up to `newest`; what is newer was damaged, and will be replaced."""
        until = [step for step in self.steps() if step <= newest]
        for step in until[: -self.keep]:
            if step != self._best:
                shutil.rmtree(self.path(step))

    def _clean(self) -> None:
        """Removes what a killed writer left."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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
    return {name: _on_cpu(parameter) for name, parameter in _trainable(model)}


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _on_cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _gather_for_another(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]
) -> None:
    """This process's share in what another writes: tensor by tensor as it reads them."""
    for _, parameter in _trainable(model):
        whole(parameter.detach())
    for _, _, value in _optimizer_entries(model, optimizer):
        if isinstance(value, Tensor):
            whole(value)
    for tensor in averages.values():
        whole(tensor)


@torch.no_grad()
def load_trainable(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies saved values into the trainable parameters, whose dtype (fp32) stays. Raises
    DamagedCheckpoint where they are others, or of other shapes."""
    wanted = dict(_trainable(model))
    if wanted.keys() != state.keys():
        odd = sorted(wanted.keys() ^ state.keys())[:3]
        raise DamagedCheckpoint(
            f"the checkpoint holds other parameters than the model: {', '.join(odd)}"
        )
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise DamagedCheckpoint(
                f"the checkpoint holds another model: its {name} is {tuple(state[name].shape)}, "
                f"not {tuple(parameter.shape)}"
            )
    for name, parameter in wanted.items():
        fill(parameter, state[name])


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state by parameter name: tensors as `name/key`, scalars and group settings as
    JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, key, value in _optimizer_entries(model, optimizer):
        if isinstance(value, Tensor):
            # A copy: bitsandbytes shares one table between all parameters' states.
            tensors[f"{name}/{key}"] = whole(value.detach()).to("cpu", copy=True).contiguous()
        else:
            scalars[f"{name}/{key}"] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, {"state": scalars, "groups": groups}


def _optimizer_entries(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, str, Any]]:
    """Name of the parameter, key and value of all its state, in the same order everywhere."""
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name, key, value


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    """The inverse of `optimizer_state`. Moments stay in their own dtype and go where the parameter
    is."""
    saved_groups = scalars["groups"]
    if len(saved_groups) != len(optimizer.param_groups):
        raise DamagedCheckpoint(
            f"the checkpoint holds {len(saved_groups)} groups of parameters, the optimizer "
            f"{len(optimizer.param_groups)}: it was written by another version or with other "
            "optim.* settings"
        )
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    devices = _step_devices(optimizer)
    parameters = dict(model.named_parameters())
    for target, value in {**tensors, **scalars["state"]}.items():
        name, _, key = target.rpartition("/")
        parameter = parameters[name]
        if isinstance(value, Tensor):
            on_cpu = key == "step" and devices[parameter].type == "cpu"
            value = value.cpu() if on_cpu else like(parameter, value)
        optimizer.state[parameter][key] = value


def _step_devices(optimizer: torch.optim.Optimizer) -> dict[Tensor, torch.device]:
    """Where torch's optimizers count a parameter's steps: fused ones on its device."""
    return {
        parameter: parameter.device
        if group.get("fused") or group.get("capturable")
        else torch.device("cpu")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


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
