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
VIEWS, VIEWS_SEED = 24, 13  # held-out pictures of the subject


class DemoDataConfig(Section):
    """The pictures of the embedded default (scripts/toy/demo_data.py)."""

    output: Path = Path("runs/toy-data")
    """Folder that gets a folder of pictures for each."""


def main(arguments: list[str]) -> None:
    output = load(DemoDataConfig, arguments).output
    if not (output / STYLE).exists():
        toy.write_pictures(output / STYLE, TRAINING, seed=TRAINING_SEED, style=STYLE)
    for folder, name in ((SUBJECT, WORD), (f"{SUBJECT}-token", TOKEN)):
        _write_subject(output / folder, SUBJECT_PICTURES, name, seed=SUBJECT_SEED)
        _write_subject(output / f"{folder}-held-out", VIEWS, name, seed=VIEWS_SEED, square=True)
    held_out = output / f"{STYLE}-held-out"
    if not held_out.exists():
        toy.write_pictures(held_out, HELD_OUT, seed=HELD_OUT_SEED, style=STYLE, square=True)


def _write_subject(folder: Path, count: int, name: str, *, seed: int, square: bool = False) -> None:
    if not folder.exists():
        toy.write_pictures(folder, count, seed=seed, subject=SUBJECT, name=name, square=square)


if __name__ == "__main__":
    command(main)
