"""Puts the toy base together before its training: trained VAE, everything else with random weights.

python scripts/toy/assemble.py vae=runs/toy-vae/vae output=runs/toy-init
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.config import Section, UserError, command, load


class AssembleConfig(Section):
    """The toy base with random UNet and text encoder (scripts/toy/assemble.py)."""

    vae: Path
    """The trained toy VAE's folder."""
    output: Path
    """Folder of the pipeline to write."""
    seed: int = 0
    """Seed of the random weights."""


def main(arguments: list[str]) -> None:
    config = load(AssembleConfig, arguments)
    if not (config.vae / "config.json").is_file():
        raise UserError(f"vae={config.vae} is not an AutoencoderKL folder; run train_vae.py first")
    import torch
    from diffusers import AutoencoderKL

    from scripts.toy.architecture import build_pipeline
    from scripts.toy.vocabulary import vocabulary

    torch.manual_seed(config.seed)
    pipeline: Any = build_pipeline(vocabulary(), config.output)
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(str(config.vae)))
    pipeline.save_pretrained(str(config.output))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    command(main)
