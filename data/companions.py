"""What stands beside a picture and is none itself: its mask, its depth map, its focus point."""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Sequence
from typing import Any, Literal

from data.images import EXTENSIONS
from data.listing import FOCUS, Listing, Tally, extension, shown, stem

Kind = Literal["mask", "depth"]
KINDS: tuple[Kind, ...] = ("mask", "depth")
ENDS: dict[Kind, tuple[str, ...]] = {"mask": (".mask", "-masklabel"), "depth": (".depth",)}
FOLDERS: dict[Kind, str] = {"mask": "masks", "depth": "depth"}
PICTURES = "images"  # masks/ and depth/ may stand beside this folder, as texts/ does

Focus = tuple[float, float]


def split_pictures(listing: Listing) -> tuple[list[str], list[str]]:
    """The ids with a picture's extension: those that are pictures, and those that are the mask or
    depth map of one of them."""
    pictures: list[str] = []
    companions: list[str] = []
    for name in listing.names:
        if extension(name) in EXTENSIONS:
            (companions if is_companion(listing, name) else pictures).append(name)
    return pictures, companions


def is_companion(listing: Listing, name: str) -> bool:
    """Whether it is named as the mask or depth map of a picture that is there."""
    return any(listing.pictures_named(owner) for owner in _owners(stem(name)))


def _owners(own: str) -> list[str]:
    """The stems of the pictures that a file of this stem could belong to."""
    owners = []
    for kind in KINDS:
        owners += [own[: -len(end)] for end in ENDS[kind] if own.endswith(end)]
        if FOLDERS[kind] in own:
            owners += _without_folder(own, FOLDERS[kind])
    return owners


def _without_folder(own: str, folder: str) -> list[str]:
    *parents, base = own.split("/")
    owners = []
    if parents[:1] == [folder]:
        rest = "/".join([*parents[1:], base])
        owners += [rest, f"{PICTURES}/{rest}"]
    if parents[-1:] == [folder]:
        owners.append("/".join([*parents[:-1], base]))
    return owners


def find(listing: Listing, picture: str, kind: Kind) -> str | None:
    """The picture's mask or depth map, by name. Raises ValueError where there are two.

    NAME.mask.png or NAME-masklabel.png (for depth: NAME.depth.png) beside it, NAME in a folder
    masks (depth) beside it, or its path below one at the top, with or without a leading images/.
    """
    places = _places(stem(picture), kind)
    found = [name for place in places for name in listing.pictures_named(place)]
    if len(found) > 1:
        names = " and ".join(shown(name) for name in found)
        raise ValueError(f"has more than one {kind}, {names}: remove one")
    return found[0] if found else None


def _places(own: str, kind: Kind) -> Sequence[str]:
    folder = FOLDERS[kind]
    parent, base = posixpath.split(own)
    places = [own + end for end in ENDS[kind]]
    places += [posixpath.join(parent, folder, base), f"{folder}/{own}"]
    places.append(f"{folder}/{own.removeprefix(PICTURES + '/')}")
    return list(dict.fromkeys(places))


def unowned(listing: Listing, pictures: Sequence[str]) -> list[str]:
    """A note on pictures that are named as a mask or depth map, but of no picture that is there."""
    tally = Tally(name for name in pictures if _owners(stem(name)))
    return tally.note("named like the mask or depth map of no picture here, so taken as pictures")


def focus_beside(listing: Listing, picture: str) -> Focus | None:
    """What NAME.focus.json says, {"x": ..., "y": ...}. Raises ValueError saying what is wrong."""
    name = stem(picture) + FOCUS
    if name not in listing:
        return None
    try:
        value = json.loads(listing.text(name))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{shown(name)} is not JSON ({error})") from None
    return read_focus(value, shown(name))


def read_focus(value: Any, where: str) -> Focus:
    """A point from [x, y] or {"x": x, "y": y}. Raises ValueError unless both are from 0 to 1."""
    if isinstance(value, dict):
        value = [value.get("x"), value.get("y")]
    try:
        x, y = (float(part) for part in value if not isinstance(part, bool))
    except (TypeError, ValueError, OverflowError):
        x = y = math.nan
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(
            f"{where}: a focus is the x and y of a point, each from 0 to 1 of the picture's side"
        )
    return x, y
