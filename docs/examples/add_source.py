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
    """The layout of a folder with nothing but named folders of pictures; else None."""
    pictures, _ = companions.split_pictures(listing)
    captioned = any(extension(name) in CAPTION_EXTENSIONS for name in listing.names)
    if default is not None or captioned or not pictures:
        return None
    return Folders(listing, pictures) if all("/" in name for name in pictures) else None


def main(arguments: list[str]) -> None:
    captions.OTHERS.append(by_folder)
    lora.main(arguments)


if __name__ == "__main__":
    command(main)
