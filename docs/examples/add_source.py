"""A source of pictures in one file: folders whose names are the captions, as many data sets come.

    accelerate launch docs/examples/add_source.py data.path=my/folders output=runs/by-folder

takes my/folders/red_circle/001.png as "red circle", and trains as train/lora.py does, whose
arguments it takes. A number and `_` at the head of a name, which
other tools read as repeats, is left out; data.captions.prefix and the like work as always.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from data import captions, companions
from data.captions import Layout
from data.listing import CAPTION_EXTENSIONS, Listing, extension
from train import lora
from train.config import command

ANYTHING = {"data", "images", "img", "photos", "pictures", "pics", "raw", "train", "training"}


class Folders(Layout):
    """Pictures that are captioned by the folder that they lie in."""

    def __init__(self, listing: Listing, pictures: Sequence[str]) -> None:
        super().__init__(listing)
        self.pictures = pictures
        self.recognised = f"{len(pictures)} pictures captioned by the folders that they lie in"

    def captions(self, name: str) -> tuple[str, ...]:
        """`10_red_circle/001.png` is "red circle"."""
        folder = name.split("/")[-2]
        words = re.sub(r"^\d+_", "", folder).replace("_", " ").strip()
        if not words:
            raise ValueError(f"lies in {folder}/, which names nothing: rename the folder")
        return (words,)


def by_folder(listing: Listing, default: str | None) -> Layout | None:
    """The layout of two or more folders of pictures, named for what they show; else None."""
    pictures, _ = companions.split_pictures(listing)
    captioned = any(extension(name) in CAPTION_EXTENSIONS for name in listing.names)
    if default is not None or captioned:
        return None
    named = {name.split("/")[-2] if "/" in name else "" for name in pictures}
    generic = "" in named or any(name.lower() in ANYTHING for name in named)
    return Folders(listing, pictures) if len(named) > 1 and not generic else None


def main(arguments: list[str]) -> None:
    captions.OTHERS.append(by_folder)
    lora.main(arguments)


if __name__ == "__main__":
    command(main)
