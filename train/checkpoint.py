"""Checkpoints that are complete or absent: safetensors and JSON, written aside, synced, renamed,
then pruned.

A checkpoint is a folder `step-00000100` with `model.safetensors` (the trainable parameters by
name), `optimizer.safetensors` (its state by parameter name), with a moving average
`averages.safetensors`, and `manifest.json` (step, sizes, hashes, scalars). The learning rate, the
data position and all randomness are functions of the step and need no state. Beside them
`best.json` tells which of them is kept for its held-out loss. Whatever begins with a dot is on its
way, and the next run sees to it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from errno import EFBIG
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train import zero
from train.averaging import Averages
from train.background import Background
from train.checkpoint_files import (
    FORMAT,
    MANIFEST,
    DamagedCheckpoint,
    named,
    read_manifest,
    read_tensors,
    sync,
    verify,
    write_pieces,
    write_synced,
)
from train.config import RunFailed
from train.packed import Packed, Scattered
from train.sharding import is_sharded
from train.training_state import (
    gather_for_another,
    load_optimizer,
    load_trainable,
    optimizer_state,
    trainable_state,
)

_WRITING, _REPLACED, _REMOVED = ".writing-", ".replaced-", ".removed-"
_BEST = "best.json"
_PATIENCE = 1800  # seconds that a run which ends waits for its last checkpoint


Files = Mapping[str, Packed | Scattered]
"""What the files of a checkpoint hold, by their names without `.safetensors`."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` of them, and the best.

    writes: whether this process writes them; one of several does. asynchronous: writes beside
    training, which goes on with its own tensors once they are copied; `wait` tells when all is on
    the disk, and `close` belongs to the end of a run.
    """

    def __init__(
        self, folder: Path, *, keep: int, writes: bool = True, asynchronous: bool = False
    ) -> None:
        self.folder, self.keep = folder, keep
        self.writes, self.asynchronous = writes, asynchronous
        self._best: int | None = None
        self._verified: set[int] = set()
        self._background = Background("writing a checkpoint")
        self._memory: dict[str, Packed] = {}
        self._model: nn.Module | None = None
        self._parameters: dict[str, nn.Parameter] = {}

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        return self.folder / named(step)

    def facts(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint. Raises DamagedCheckpoint."""
        return read_manifest(self.path(step))

    # Saving

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

        averages: what `Averages.state` gives; facts: what JSON can hold. Raises RunFailed, and
        leaves the older checkpoints, where a parameter is not finite or the disk does not take it;
        an asynchronous one raises that at the next `wait`, or `save` if that fails too.
        """
        parameters = self._parameters_of(model)
        with zero.whole(parameters.values()):
            if self.writes:
                self._hold(step, parameters, optimizer, averages, facts)
            elif is_sharded(model):
                gather_for_another(parameters, optimizer, averages or {})

    def _hold(
        self,
        step: int,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        averages: dict[str, Tensor] | None,
        facts: dict[str, Any],
    ) -> None:
        """Writes all of it, or copies it to be written beside training."""
        tensors, scalars = optimizer_state(parameters, optimizer)
        state = {"model": trainable_state(parameters), "optimizer": tensors}
        if averages:
            state["averages"] = averages
        facts = {"optimizer": scalars, **facts}
        aside = self.asynchronous and self._wrote_the_last()
        hold = self._packed if aside else self._scattered
        files = {name: hold(name, tensors) for name, tensors in state.items()}
        self._refuse_non_finite(step, files["model"])
        if aside:
            self._background.start(partial(self._put, step, files, copy.deepcopy(facts)))
        else:
            self._put(step, files, facts)

    def _parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Those that train, by name, as they were when this model was first saved."""
        if self._model is not model:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._model, self._parameters = model, trained
        return self._parameters

    def _scattered(self, _: str, tensors: dict[str, Tensor]) -> Scattered:
        return Scattered(tensors)

    def _packed(self, file: str, tensors: dict[str, Tensor]) -> Packed:
        """Copies, in memory that is kept from one checkpoint to the next."""
        packed = self._memory.get(file)
        if packed is None or not packed.fits(tensors):
            packed = self._memory[file] = Packed(tensors)
        packed.fill(tensors)
        return packed

    def _wrote_the_last(self) -> bool:
        """Waits for it: at most one state is held besides that in training. Where it could not be
        written, by a disk that was full for a while, this one may be."""
        try:
            self.wait()
        except RunFailed as error:
            print(f"warning: {error}", flush=True)
            return False
        return True

    def wait(self) -> None:
        """Until whatever was saved is on the disk. Raises RunFailed where it could not be."""
        self._background.wait()

    def close(self) -> None:
        """`wait` for the end of a run, however it ends: where another exception ends it, what goes
        wrong here is only said. Waits half an hour at most."""
        ending = sys.exception()
        try:
            self._background.wait(_PATIENCE)
        except Exception as error:
            if ending is None:
                raise
            print(f"warning: {error}", flush=True)

    def _put(self, step: int, files: Files, facts: dict[str, Any]) -> None:
        try:
            self._write(step, files, facts)
        except OSError as error:
            with suppress(OSError):
                self._clean()
            raise self._not_written(f"the checkpoint of step {step}", error) from None
        self._verified.add(step)
        self._prune(step)

    def _write(self, step: int, files: Files, facts: dict[str, Any]) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
        self._clean()
        temporary = self.folder / f"{_WRITING}{named(step)}"
        temporary.mkdir()
        listed = {}
        for name, content in files.items():
            file = f"{name}.safetensors"
            listed[file] = write_pieces(temporary / file, content.pieces())
        manifest = {"format": FORMAT, "step": step, "files": listed, **facts}
        write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1))
        sync(temporary)
        self._place(temporary, self.path(step))

    def _place(self, temporary: Path, path: Path) -> None:
        """Under its name, in place of what has it."""
        replaced = self._set_aside(path, _REPLACED)
        os.replace(temporary, path)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _set_aside(self, path: Path, prefix: str) -> Path:
        """Half a checkpoint must not have the name of one, so what goes changes its name first."""
        aside = path.with_name(f"{prefix}{path.name}")
        if path.exists():
            os.replace(path, aside)
        return aside

    def _prune(self, newest: int) -> None:
        """Leaves the `keep` complete ones up to `newest`; what is newer was damaged, and will be
        replaced."""
        until = [step for step in self.steps() if step <= newest]
        kept = 0
        for step in reversed(until) if len(until) > self.keep else ():
            if kept < self.keep:
                kept += self._is_intact(step)
            elif step != self._best:
                shutil.rmtree(self._set_aside(self.path(step), _REMOVED), ignore_errors=True)

    def _is_intact(self, step: int) -> bool:
        """Whether it is complete. Hashes are read once, of what this process has not written."""
        try:
            verify(self.path(step), hashes=step not in self._verified)
        except DamagedCheckpoint:
            return False
        self._verified.add(step)
        return True

    def _clean(self) -> None:
        """Removes what a killed writer left, but for a checkpoint that it was about to replace."""
        for path in self.folder.glob(f"{_REPLACED}*"):
            name = self.folder / path.name.removeprefix(_REPLACED)
            if not name.exists():
                os.replace(path, name)
        for start in (_WRITING, _REPLACED, _REMOVED):
            for path in self.folder.glob(f"{start}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _refuse_non_finite(self, step: int, state: Packed | Scattered) -> None:
        if state.is_finite():
            return
        name = next(name for name, value in state.tensors.items() if not value.isfinite().all())
        raise RunFailed(
            f"training diverged before step {step}: {name} is not finite; {self._newest()}. Lower "
            "optim.learning_rate, or use train.mixed_precision=bf16 or no, in a new output="
        )

    def _not_written(self, what: str, error: OSError) -> RunFailed:
        too_large = error.errno == EFBIG
        remedy = "Raise the limit of file sizes (ulimit -f)" if too_large else "Free space there"
        return RunFailed(
            f"{what} could not be written to {self.folder}: {error}; {self._newest()}. {remedy}, "
            "then give the same command again"
        )

    def _newest(self) -> str:
        intact = next((step for step in reversed(self.steps()) if self._is_intact(step)), None)
        if intact is None:
            return "there is none before it"
        return f"the checkpoint of step {intact} is intact"

    # The best

    def mark_best(self, step: int | None, **facts: Any) -> None:
        """Keeps the checkpoint of `step`, which was saved, until another is better; None keeps
        none. best.json, for whoever looks, has the facts too; nothing here reads it."""
        self.wait()
        self._best = step
        if self.writes and step is None:
            (self.folder / _BEST).unlink(missing_ok=True)
        elif self.writes:
            try:
                self._write_best({"step": step, **facts})
            except OSError as error:
                raise self._not_written(_BEST, error) from None

    def _write_best(self, content: dict[str, Any]) -> None:
        temporary = self.folder / f"{_WRITING}{_BEST}"
        write_synced(temporary, json.dumps(content) + "\n")
        os.replace(temporary, self.folder / _BEST)
        sync(self.folder)

    # Loading

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Averages | None = None,
    ) -> int:
        """Loads the newest intact checkpoint; returns its step, 0 if there is none at all. Raises
        DamagedCheckpoint if none is intact. For one process: several `find` once, then `load`."""
        step = self.find()
        if step:
            self.load(step, model, optimizer, averages, verified=True)
        return step

    def find(self) -> int:
        """The step of the newest intact checkpoint, 0 if there is none at all; clears away what a
        killed run has left.

        A damaged one is named and passed over. Raises DamagedCheckpoint if none is intact: a run
        with checkpoints never restarts silently at 0.
        """
        self.wait()
        if self.writes:
            self._clean()
        damage: list[str] = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except DamagedCheckpoint as error:
                damage.append(str(error))
                print(f"warning: {error}; falling back to the checkpoint before it", flush=True)
                continue
            self._verified.add(step)
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
        *,
        verified: bool = False,
    ) -> None:
        """Loads the checkpoint of `step`. Raises DamagedCheckpoint.

        verified: by `find`, of this process or another, so that hashes need not be read again.
        """
        self.wait()
        path = self.path(step)
        manifest = verify(path, hashes=not verified)
        parameters = dict(model.named_parameters())
        with zero.whole((p for p in parameters.values() if p.requires_grad), written=True):
            load_trainable(parameters, read_tensors(path / "model.safetensors"))
        tensors = read_tensors(path / "optimizer.safetensors")
        load_optimizer(parameters, optimizer, tensors, manifest["optimizer"])
        if averages is not None:
            has_averages = "averages.safetensors" in manifest["files"]
            averages.load(read_tensors(path / "averages.safetensors") if has_averages else {})
