"""Writes the pictures of the embedded defaults: a style and a subject to learn, and held-out ones.

python scripts/toy/demo_data.py            # into runs/toy-data, if it is not there
"""

from __future__ import annotations

from pathlib import Path

from data import toy
from train.config import Section, command, load

STYLE = "mosaic"
# DreamBooth's name for the subject, and textual inversion's.
SUBJECT, WORD, TOKEN, SUBJECT_PICTURES, SUBJECT_SEED = "owl", "owl circle", "<owl>", 12, 12
TRAINING, HELD_OUT = 192, 256  # pictures
TRAINING_SEED, HELD_OUT_SEED = 10, 11


class DemoDataConfig(Section):
    """The pictures of the embedded default (scripts/toy/demo_data.py)."""

    output: Path = Path("runs/toy-data")
    """Folder that gets a folder of pictures for each."""


def main(arguments: list[str]) -> None:
    output = load(DemoDataConfig, arguments).output
    if not (output / STYLE).exists():
        toy.write_pictures(output / STYLE, TRAINING, seed=TRAINING_SEED, style=STYLE)
    for folder, name in ((SUBJECT, WORD), (f"{SUBJECT}-token", TOKEN)):
        if not (output / folder).exists():
            toy.write_pictures(
                output / folder,
                SUBJECT_PICTURES,
                seed=SUBJECT_SEED,
                subject=SUBJECT,
                name=name,
            )
    held_out = output / f"{STYLE}-held-out"
    if not held_out.exists():
        toy.write_pictures(held_out, HELD_OUT, seed=HELD_OUT_SEED, style=STYLE, square=True)


if __name__ == "__main__":
    command(main)
