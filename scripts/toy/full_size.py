"""Writes a folder with Stable Diffusion 2.1's exact configuration and random weights.

    python scripts/toy/full_size.py OUT
    python scripts/toy/full_size.py output=OUT dtype=fp32

It lets the real size be exercised on a machine without the real weights; its pictures are noise.
The tokenizer is the toy world's, because CLIP's vocabulary is not ours to ship.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from scripts.toy.random_base import PARAMETERS, write
from train.config import Section, UserError, command, load


class FullSizeConfig(Section):
    """Stable Diffusion 2.1 in size, random in weights (scripts/toy/full_size.py)."""

    output: Path
    """Folder to write (also the first argument); must be empty or absent."""
    seed: int = 0
    """Seed of the random weights."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Precision of the files: 2.6 GB or 5.2 GB."""


def main(arguments: list[str]) -> None:
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        arguments = [f"output={arguments[0]}", *arguments[1:]]
    config = load(FullSizeConfig, arguments)
    check(config)
    temporary = config.output.with_name(f".writing-{config.output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary, seed=config.seed, dtype=config.dtype)
    if config.output.exists():
        config.output.rmdir()
    os.replace(temporary, config.output)
    print(f"wrote {config.output}")


def check(config: FullSizeConfig) -> None:
    """Raises UserError if the output is taken or its disk too small."""
    from train.rundir import check_space

    if config.output.is_file() or (config.output.is_dir() and any(config.output.iterdir())):
        raise UserError(f"output={config.output} is not an empty folder; give another one")
    size = PARAMETERS * (2 if config.dtype == "fp16" else 4)
    check_space(config.output, size, what="the model")


if __name__ == "__main__":
    command(main)
