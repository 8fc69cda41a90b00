"""The run directory: resolved configuration, manifest, and whether the run is new, unfinished or
done."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from train import stopping
from train.config import ROOT, RunConfig, UserError, dump

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "Pillow",
)

FAILED = "failed.json"
"""What a run ended with that could not go on."""


def check(config: RunConfig, *, result: str) -> bool:
    """Validates the run directory without changing it; True if the run is already finished.

    result: the folder the run ends in ("adapter" or "full"). Raises UserError if the directory
    cannot be written.
    """
    output = config.output
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; give a directory")
    if _is_finished(output, result, config.train.steps):
        return True
    parent = _there(output)
    try:
        # Of what may be written the mode does not tell all: file systems are mounted read-only.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written ({parent}: {error.strerror or error}); choose "
            "another output="
        ) from None
    return False


def _is_finished(output: Path, result: str, steps: int) -> bool:
    """Whether the result is there, and is that of the last checkpoint: a run that was given more
    steps has had one before."""
    folder, last = output / result, output / "checkpoints" / f"step-{steps:08d}"
    if not (folder.is_dir() and newest(output) == steps and last.is_dir()):
        return False
    return folder.stat().st_mtime_ns >= last.stat().st_mtime_ns


def newest(output: Path) -> int | None:
    """The step of the newest checkpoint, intact or not; None before the first: until then nothing
    binds a run directory to what was begun in it."""
    names = (path.name.removeprefix("step-") for path in (output / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=None)


def has_checkpoints(output: Path) -> bool:
    """Whether a run has trained here."""
    return newest(output) is not None


def checkpoint_bytes(output: Path) -> list[int]:
    """The size of each checkpoint that is there."""
    folders = (output / "checkpoints").glob("step-*")
    return [sum(map(size, folder.rglob("*"))) for folder in folders]


def size(file: Path) -> int:
    """Bytes; 0 for what is no file, or is gone."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:  # pruned by the run that a dry run looks at
        return 0


def check_space(folder: Path, needed: int, *, what: str) -> None:
    """Raises UserError if `folder`'s disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(_there(folder)).free
    if free < needed:
        raise UserError(
            f"not enough space in {folder} for {what}: {_amount(needed)} needed, {_amount(free)} "
            "free. Free some, or choose another output= or data.cache="
        )


def are_on_one_disk(*folders: Path) -> bool:
    """Also folders that are still to be made."""
    return len({_there(folder).stat().st_dev for folder in folders}) == 1


def _there(folder: Path) -> Path:
    """The folder, or what is there of the path to it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _amount(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def create(config: RunConfig, manifest: dict[str, Any], *, changes: Sequence[str] = ()) -> None:
    """Writes config.yaml and manifest.json, whose "changes" say what differed whenever the run was
    resumed; called by one process.

    changes: what differs now, if anything. That it was agreed to holds for this once.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    for ended in (stopping.FILE, FAILED):
        (config.output / ended).unlink(missing_ok=True)
    once = config.checkpoint.model_copy(update={"accept_changes": False})
    # First: a run killed here then has what it agreed to put down twice, not never.
    history = {"changes": _history(config.output, changes)}
    text = json.dumps({**environment(), "entry": entry(), **manifest, **history}, indent=2)
    _write(config.output / "manifest.json", text + "\n")
    _write(config.output / "config.yaml", dump(config.model_copy(update={"checkpoint": once})))


def fail(output: Path, error: BaseException) -> None:
    """Puts down in failed.json what a run has ended with, until it goes on."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    content = {"error": lines[0], "time": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(OSError):
        _write(output / FAILED, json.dumps(content) + "\n")


def _history(output: Path, changes: Sequence[str]) -> list[dict[str, Any]]:
    """What had changed when the run was resumed before, and what has now."""
    step = newest(output)
    if step is None:
        return []
    known = read_manifest(output).get("changes")
    now = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "changes": list(changes),
    }
    return [*(known if isinstance(known, list) else []), *([now] if changes else [])]


def read_manifest(output: Path) -> dict[str, Any]:
    """Empty where there is none. Raises UserError for one that cannot be read."""
    path = output / "manifest.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another output=") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no manifest of a run; choose another output=")
    return content


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a run killed here must still resume."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Versions, git revision and hardware."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "sd_atelier": _version("sd-atelier"),
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
    }


def entry() -> str | None:
    """The program that this process runs, as a path within the project if it is there; None where
    it is none that could be given to a launcher again (a notebook, a test)."""
    file = Path(sys.argv[0])
    if file.suffix != ".py" or "site-packages" in file.parts:
        return None
    inside = file.resolve().is_relative_to(ROOT)
    return str(file.resolve().relative_to(ROOT) if inside else file)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
