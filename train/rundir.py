"""The run directory: resolved configuration, manifest, and whether the run is new, unfinished or
done."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from train.config import ROOT, RunConfig, Section, UserError, dump

# Keys that may change between the runs of one directory without changing what is trained.
HARMLESS = (
    "dry_run",
    "output",
    "data.cache",
    "data.workers",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "dreambooth.class_batch_size",
    "checkpoint.",
    "preview.every",
    "validation.every",
    "validation.use_best",
    "tracking.",
    "evaluation.",
)
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


def check(config: RunConfig, *, result: str) -> bool:
    """Validates the run directory without changing it; True if the run is already finished.

    result: the folder the run ends in ("adapter" or "full"). Raises UserError if the directory
    holds a run with another configuration, or cannot be written.
    """
    output = config.output
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; give a directory")
    if (output / "config.yaml").exists() and has_checkpoints(output):
        _check_same(config)
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(
            f"output={output} cannot be written ({parent} is read-only); choose another output"
        )
    return (output / result).is_dir() and (
        output / "checkpoints" / f"step-{config.train.steps:08d}"
    ).is_dir()


def has_checkpoints(output: Path) -> bool:
    """Whether a run has trained here: before its first checkpoint nothing binds it."""
    return any((output / "checkpoints").glob("step-*"))


def check_unchanged(output: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError where the run to be resumed in `output` had another base or dataset."""
    path = output / "manifest.json"
    if not (path.exists() and has_checkpoints(output)):
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another output=") from None
    before, now = _hashes(old), _hashes(manifest)
    changed = [
        f"{part}: {before[part]!r} -> {now[part]!r}"
        for part in sorted(before.keys() & now.keys())
        if before[part] != now[part]
    ]
    if changed:
        raise UserError(
            f"output={output} holds a run on another base or other pictures (sha256 "
            f"{'; '.join(changed)}). Choose another output=, or restore them to resume"
        )


def _hashes(manifest: dict[str, Any]) -> dict[str, Any]:
    """Those of the dataset and of each part of the base."""
    base, dataset = (manifest.get(part, {}).get("sha256") for part in ("base", "dataset"))
    return {"dataset": dataset} | {f"base.{part}": sha for part, sha in (base or {}).items()}


def check_space(folder: Path, needed: int, *, what: str) -> None:
    """Raises UserError if `folder`'s disk has fewer than `needed` bytes free."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"not enough space in {folder} for {what}: {needed / 2**30:.2f} GiB needed, "
            f"{free / 2**30:.2f} GiB free. Free some, or choose another output= or data.cache="
        )


def create(config: RunConfig, manifest: dict[str, Any]) -> None:
    """Writes config.yaml and manifest.json; called by one process."""
    config.output.mkdir(parents=True, exist_ok=True)
    _write(config.output / "config.yaml", dump(config))
    text = json.dumps({**environment(), **manifest}, indent=2)
    _write(config.output / "manifest.json", text + "\n")


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


def differences(old: dict[str, Any], new: Section, prefix: str = "") -> Iterator[str]:
    """`key: old -> new` for every dotted key that differs. What only one has came or went with a
    version of this program, but a section is as good as a value to one that can be null."""
    now = new.model_dump(mode="json")
    for name, value in new:
        if name not in old:
            continue
        if isinstance(value, Section) and isinstance(old[name], dict):
            yield from differences(old[name], value, f"{prefix}{name}.")
        elif old[name] != now[name]:
            yield f"{prefix}{name}: {old[name]!r} -> {now[name]!r}"


def _check_same(config: RunConfig) -> None:
    path = config.output / "config.yaml"
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another output=") from None
    if not isinstance(old, dict):
        raise UserError(f"{path} is no configuration of a run; choose another output=")
    changed = [line for line in differences(old, config) if not line.startswith(HARMLESS)]
    if changed:
        raise UserError(
            f"output={config.output} holds a run with another configuration: {'; '.join(changed)}. "
            "Choose another output=, or restore those values to resume"
        )


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
