"""Makes the README's and docs' pictures from the results of the recipe and of `make demo`.

python scripts/toy/pictures.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from train.config import Section, UserError, command, load


class PicturesConfig(Section):
    """The documentation's pictures (scripts/toy/pictures.py)."""

    demo: Path = Path("runs/demo")
    """The demo's run directory."""
    measure: Path = Path("runs/toy-measure")
    """What scripts/toy/measure.py wrote."""
    output: Path = Path("docs/images")
    """Folder to write to."""


def main(arguments: list[str]) -> None:
    config = load(PicturesConfig, arguments)
    grids = sorted(config.demo.glob("previews/step-*/grid.png"))
    if not grids or not (config.measure / "pictures").is_dir():
        raise UserError("run `make demo` and scripts/toy/measure.py first")
    from train.previews import grid

    config.output.mkdir(parents=True, exist_ok=True)
    world().save(config.output / "toy-world.png", optimize=True)
    files = sorted((config.measure / "pictures").glob("*.png"))[:32]
    pictures = [Image.open(file).convert("RGB") for file in files]
    grid([pictures[start : start + 8] for start in range(0, 32, 8)]).save(
        config.output / "toy-base.png", optimize=True
    )
    shutil.copyfile(grids[-1], config.output / "demo.png")


def world() -> Image.Image:
    """A sheet of plain scenes, each style, and the subjects."""
    from data import toy
    from train.previews import grid

    figures = list(toy.SUBJECTS)
    rows = [
        [
            Image.fromarray(
                toy.render(
                    toy.sample_scene(row, column),
                    128,
                    128,
                    style=style,
                    subject=figures[column % len(figures)] if subjects else None,
                )
            )
            for column in range(8)
        ]
        for row, (style, subjects) in enumerate(
            [(None, False), *((style, False) for style in toy.STYLES), (None, True)]
        )
    ]
    return grid(rows)


if __name__ == "__main__":
    command(main)
