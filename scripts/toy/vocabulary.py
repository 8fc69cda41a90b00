"""Every word of the toy world's captions, for the tokenizers."""

from __future__ import annotations

from data import toy

FILLERS = ("a an the photo picture of on in with and style background , .",)


def vocabulary() -> list[str]:
    words = [*toy.SIZES, *toy.COLOURS, *toy.SHAPES, *toy.BACKGROUNDS, *toy.STYLES, *toy.SUBJECTS]
    return [*FILLERS, *words]
