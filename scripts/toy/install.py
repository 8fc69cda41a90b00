"""Puts the trained toy models where the embedded default finds them, as fp16 safetensors.

python scripts/toy/install.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from train.config import Section, UserError, command, load


class InstallConfig(Section):
    """Copies the recipe's results into data/assets (scripts/toy/install.py)."""

    base: Path = Path("runs/toy-base/full")
    """The trained base, a diffusers folder."""
    clip: Path = Path("runs/toy-clip/clip")
    """The trained CLIP folder."""
    checker: Path = Path("runs/toy-checker/checker")
    """The trained checker's folder."""
    output: Path = Path("data/assets")
    """Folder that gets toy-base, toy-clip and toy-checker."""


def main(arguments: list[str]) -> None:
    config = load(InstallConfig, arguments)
    for path in (config.base, config.clip, config.checker):
        if not path.is_dir():
            raise UserError(f"{path} is missing; scripts/toy/make.sh makes it")
    import torch

    from train.models import load_pipeline

    for name in ("toy-base", "toy-clip", "toy-checker"):
        shutil.rmtree(config.output / name, ignore_errors=True)
    pipeline = load_pipeline(str(config.base), dtype=torch.float16)
    pipeline.save_pretrained(str(config.output / "toy-base"), safe_serialization=True)
    _load_as_fp32(config.output / "toy-base" / "text_encoder" / "config.json")
    shutil.copytree(config.clip, config.output / "toy-clip")
    shutil.copytree(config.checker, config.output / "toy-checker")
    total = sum(file.stat().st_size for file in config.output.rglob("*") if file.is_file())
    print(f"{config.output}: {total / 2**20:.1f} MiB")


def _load_as_fp32(config: Path) -> None:
    """A plain from_pretrained would take the text encoder in fp16, as transformers does, and the
    UNet in fp32, as diffusers does."""
    values = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command(main)
