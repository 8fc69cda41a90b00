"""As what a folder is read, and with it where each picture's captions come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data import companions
from data.companions import Focus, Kind
from data.images import EXTENSIONS
from data.listing import CAPTION_EXTENSIONS, METADATA, Listing, Tally, extension, shown, stem
from train.config import UserError

Recognise = Callable[[Listing, "str | None"], "Layout | None"]
OTHERS: list[Recognise] = []
"""Layouts of others (docs/extending.md), asked of a folder without metadata file; None is no."""

IMAGES, TEXTS = companions.PICTURES, ("texts", "captions")


class Layout:
    """The pictures of a folder, and what belongs to each of them.

    Its methods may be called from several threads; they raise ValueError saying why a picture
    cannot be used.
    """

    pictures: Sequence[str]
    """The ids, sorted."""
    recognised: str
    """As what the folder was read and why."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing

    def captions(self, name: str) -> tuple[str, ...]:
        """All captions of the picture; none if it has none."""
        raise NotImplementedError

    def focus(self, name: str) -> Focus | None:
        """The point that a focus crop keeps in the middle."""
        return companions.focus_beside(self.listing, name)

    def companion(self, name: str, kind: Kind) -> str | None:
        """The name of the picture's mask or depth map."""
        return companions.find(self.listing, name, kind)

    def notes(self, several: Tally) -> list[str]:
        """What is to be said once all is read; `several`: pictures with more than one caption."""
        return []


def recognise(listing: Listing, default: str | None, column: str | None = None) -> Layout:
    """The layout of the folder: metadata file, images/ + texts/, text files beside the pictures,
    or pictures alone where `default` is to be the caption of them all.

    column: the key of the captions in a metadata file. What is ignored is added to the listing's
    notes. Raises UserError where there are no pictures, or no captions at all.
    """
    metadata = [name for name in METADATA if name in listing or name in listing.problems]
    if len(metadata) > 1:
        names = " and ".join(metadata)
        raise UserError(f"{listing.folder} holds {names}: keep the one that is to be read")
    nested = [n for n in listing.names if n.endswith(METADATA) and n not in METADATA]
    listing.notes += Tally(nested).note(
        "metadata files below the folder are not read; give the folder that holds one as a path"
    )
    if metadata:
        from data.metadata import Metadata

        return Metadata(listing, metadata[0], column)
    for other in OTHERS:
        if (found := other(listing, default)) is not None:
            return found
    pictures, left_aside = companions.split_pictures(listing)
    listing.notes += companions.unowned(listing, pictures)
    listing.notes += Tally(left_aside).note("masks and depth maps, not taken as pictures")
    if not pictures and not listing.problems:
        kinds = " ".join(sorted(EXTENSIONS))
        raise UserError(f"{listing.folder} holds no pictures ({kinds}): give the folder that does")
    layout: Sidecars = Pairs(listing, [n for n in pictures if n.startswith(f"{IMAGES}/")])
    if not layout.captioned:
        layout = Sidecars(listing, pictures)
    if pictures and not layout.captioned and default is None:
        raise UserError(
            f"{listing.folder} holds {len(pictures)} pictures but no captions: put a .txt or "
            f".caption file beside each, or a {METADATA[0]} into the folder, or set data.caption "
            "to one caption for all"
        )
    listing.notes += layout.unused(pictures)
    return layout


class Sidecars(Layout):
    """NAME.txt or NAME.caption beside the picture, each line a caption; or one caption for all."""

    def __init__(self, listing: Listing, pictures: Sequence[str]) -> None:
        super().__init__(listing)
        self.pictures = pictures
        self.captioned = any(self.texts(name) for name in pictures)
        self.recognised = f"{len(pictures)} pictures {self._why()}"

    def _why(self) -> str:
        if self.captioned:
            return (
                "with captions in .txt or .caption files beside them, as "
                f"{self.listing.folder} holds no metadata.jsonl, .csv or .parquet"
            )
        return f"with data.caption for all, as {self.listing.folder} holds no captions"

    def texts(self, name: str) -> list[str]:
        """The text files of a picture."""
        return self._texts(stem(name))

    def _texts(self, stem: str) -> list[str]:
        found = self.listing.with_stem(stem)
        return [name for name in found if extension(name) in CAPTION_EXTENSIONS]

    def _owner(self, text: str) -> str | None:
        """The stem of the pictures a text file is for."""
        return stem(text)

    def _is_orphan(self, name: str) -> bool:
        if extension(name) not in CAPTION_EXTENSIONS:
            return False
        owner = self._owner(name)
        return owner is None or not self.listing.pictures_named(owner)

    def captions(self, name: str) -> tuple[str, ...]:
        texts = self.texts(name)
        if not texts:
            return ()
        if len(texts) > 1:
            names = " and ".join(shown(text) for text in texts)
            raise ValueError(f"has two captions, {names}: remove one")
        owner = self.listing.pictures_named(stem(name))[0]
        if owner != name:
            raise ValueError(
                f"shares {shown(texts[0])} with {shown(owner)}: rename one of the pictures"
            )
        lines = self.listing.text(texts[0]).replace("\r", "\n").split("\n")
        return tuple(filter(None, (" ".join(line.split()) for line in lines)))

    def unused(self, pictures: Sequence[str]) -> list[str]:
        """Notes on the texts, and of these pictures those, that are not part of it."""
        orphans = Tally(name for name in self.listing.names if self._is_orphan(name))
        return orphans.note("text without a picture of its name, not used")

    def notes(self, several: Tally) -> list[str]:
        return several.note("text files of several lines, each line a caption of its own")


class Pairs(Sidecars):
    """images/NAME with texts/NAME.txt (or captions/), and so below them."""

    def _why(self) -> str:
        return (
            f"in {IMAGES}/ with captions in {' or '.join(f'{folder}/' for folder in TEXTS)}, which "
            f"{self.listing.folder} holds beside it"
        )

    def unused(self, pictures: Sequence[str]) -> list[str]:
        outside = Tally(name for name in pictures if not name.startswith(f"{IMAGES}/"))
        orphans = Tally(name for name in self.listing.names if self._is_orphan(name))
        notes = outside.note(f"pictures outside {IMAGES}/, not used")
        return notes + orphans.note(f"text that is not of a picture in {IMAGES}/, not used")

    def texts(self, name: str) -> list[str]:
        below = stem(name).removeprefix(f"{IMAGES}/")
        return [text for folder in TEXTS for text in self._texts(f"{folder}/{below}")]

    def _owner(self, text: str) -> str | None:
        folder, _, below = stem(text).partition("/")
        return f"{IMAGES}/{below}" if folder in TEXTS else None
