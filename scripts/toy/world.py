"""Writes a folder of captioned pictures of the toy world: 00000.png, 00000.txt, ...

python scripts/toy/world.py output=my/pictures count=64 style=ink
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from data import toy
from train.config import Section, UserError, command, load


class WorldConfig(Section):
    """Pictures of the toy world (scripts/toy/world.py)."""

    output: Path
    """Folder to write; must be empty or absent."""
    count: int = Field(64, ge=1)
    """Pictures."""
    seed: int = 0
    """Another seed is another world: training and held-out sets differ by it."""
    style: Literal["ink", "mosaic", "glow"] | None = None
    """How pictures are drawn; plain by default. Captions do not name it."""
    subject: Literal["owl", "robot", "clown"] | None = None
    """Draw this figure instead of the scene's shape."""
    name: str | None = None
    """What captions call the subject, for example "sks circle"."""
    square: bool = False
    """Square pictures only; otherwise half are square, the rest portrait and landscape."""
    varied: bool = False
    """Vary the captions' wording and completeness, as the base was trained."""


def main(arguments: list[str]) -> None:
    config = load(WorldConfig, arguments)
    if config.output.exists() and any(config.output.iterdir()):
        raise UserError(f"output={config.output} is not empty; give another folder")
    settings = config.model_dump(exclude={"output", "count", "seed"})
    toy.write_pictures(config.output, config.count, seed=config.seed, **settings)
    print(f"wrote {config.count} pictures to {config.output}")


if __name__ == "__main__":
    command(main)
