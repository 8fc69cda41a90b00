"""The captions of a folder's pictures: from metadata.jsonl, or from text files beside them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath

from data.images import EXTENSIONS
from data.listing import CAPTION_EXTENSIONS, METADATA, Listing, extension, few, shown, stem
from train.config import UserError


def read_captions(listing: Listing, default: str | None) -> tuple[dict[str, str], str]:
    """Each picture's caption by id, and a sentence on where they were found and why there.

    `default` is for pictures whose caption is missing or empty; what else is wrong is added to the
    listing's problems. White space within a caption becomes single spaces. Raises UserError where
    there are no pictures, or no captions at all.
    """
    if METADATA in listing.files or METADATA in listing.problems:
        captions = _from_metadata(listing, default)
        recognised = f"{len(captions)} pictures listed in {METADATA}, which {listing.folder} holds"
    else:
        captions = _from_sidecars(listing, default)
        recognised = (
            f"{len(captions)} pictures with captions in .txt or .caption files beside them, as "
            f"{listing.folder} holds no {METADATA}"
        )
    if not captions and not listing.problems:
        raise UserError(_nothing(listing))
    return captions, recognised


def _nothing(listing: Listing) -> str:
    if listing.pictures:
        return f"{listing.folder / METADATA} lists no pictures: list them, or remove it"
    kinds = " ".join(sorted(EXTENSIONS))
    return f"data.path={listing.folder} holds no pictures ({kinds}): give the folder that does"


def _keep(
    listing: Listing, captions: dict[str, str], name: str, text: str, default: str | None
) -> None:
    text = " ".join(text.split())
    if text or default is not None:
        captions[name] = text or default or ""
    else:
        listing.problems[name] = "has no caption: write one, or set data.caption for all such"


# Text files beside the pictures --------------------------------------------------------------


def _from_sidecars(listing: Listing, default: str | None) -> dict[str, str]:
    sidecars: dict[str, list[str]] = {}
    for name in listing.files:
        if extension(name) in CAPTION_EXTENSIONS:
            sidecars.setdefault(stem(name), []).append(name)
    if default is None:
        _demand_captions(listing, sidecars)
    captions: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in listing.pictures:
        beside = sidecars.get(stem(name), [])
        owner = owners.setdefault(stem(name), name)
        if beside and owner != name:
            listing.problems[name] = f"shares {beside[0]} with {owner}: rename one of the pictures"
        elif len(beside) > 1:
            listing.problems[name] = f"has two captions, {' and '.join(beside)}: remove one"
        else:
            text = _read_text(listing, beside[0]) if beside else ""
            if text is not None:
                _keep(listing, captions, name, text, default)
    orphans = [name for key, names in sidecars.items() if key not in owners for name in names]
    if orphans:
        listing.notes.append(few("text without a picture of its name", orphans))
    return captions


def _demand_captions(listing: Listing, sidecars: Mapping[str, list[str]]) -> None:
    pictures = listing.pictures
    if pictures and not any(stem(name) in sidecars for name in pictures):
        raise UserError(
            f"data.path={listing.folder} holds {len(pictures)} pictures but no captions: put a "
            f".txt or .caption file beside each, or a {METADATA} into the folder, or set "
            "data.caption to one caption for all"
        )


def _read_text(listing: Listing, name: str) -> str | None:
    content = listing.read(name)
    try:
        return None if content is None else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        listing.problems[name] = f"is not UTF-8 (byte {error.start}): save it as UTF-8"
        return None


# metadata.jsonl ------------------------------------------------------------------------------


def _from_metadata(listing: Listing, default: str | None) -> dict[str, str]:
    captions: dict[str, str] = {}
    content = listing.read(METADATA) if METADATA in listing.files else None
    lines = (content or b"").removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            _keep_line(listing, captions, line, default)
        except ValueError as error:
            listing.problems[f"{METADATA}:{number}"] = str(error)
    known = captions.keys() | listing.problems.keys()
    unlisted = [name for name in listing.pictures if name not in known]
    if unlisted:
        listing.notes.append(few(f"pictures that {METADATA} does not list, not used", unlisted))
    return captions


def _keep_line(
    listing: Listing, captions: dict[str, str], line: bytes, default: str | None
) -> None:
    """Takes one line in; ValueError says what is wrong with it."""
    if not line.strip():
        return
    file_name, text = _parse(line)
    name = _contained(file_name, listing)
    if name in captions:
        raise ValueError(f"lists {shown(name)} a second time: remove one")
    _keep(listing, captions, name, text, default)


def _parse(line: bytes) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError('needs "file_name", a string')
    if not isinstance(entry.get("text", ""), str):
        raise ValueError('"text" must be a string')
    return entry["file_name"], entry.get("text", "")


def _contained(file_name: str, listing: Listing) -> str:
    """The id of the file that is named; never one outside the folder."""
    path = PurePosixPath(file_name)
    if path.is_absolute() or ".." in path.parts or "\\" in file_name or "://" in file_name:
        raise ValueError(f"file_name {shown(file_name)} must be a path below the folder")
    name = unicodedata.normalize("NFC", path.as_posix())
    if name not in listing.files:
        why = listing.problems.get(name, "is not in the folder")
        raise ValueError(f"file_name {shown(file_name)} {why}")
    return name
