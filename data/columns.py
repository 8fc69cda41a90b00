"""Which columns of a Hugging Face dataset hold the pictures and the captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.listing import MAX_TEXT_BYTES, shown
from train.config import UserError

if TYPE_CHECKING:
    import datasets

PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")


@dataclass(frozen=True)
class Columns:
    """Where a dataset has its pictures and captions; `caption` is None where it has none."""

    image: str
    caption: str | None
    notes: list[str]

    @property
    def names(self) -> list[str]:
        return [self.image] if self.caption is None else [self.image, self.caption]

    def __str__(self) -> str:
        captions = f"captions in {self.caption}" if self.caption else "no captions"
        return f"pictures in its column {self.image}, {captions}"


def find_columns(
    path: str,
    features: datasets.Features,
    *,
    image_column: str | None,
    caption_column: str | None,
    caption: str | None,
) -> Columns:
    """The columns as configured, or as they are usually named. Raises UserError naming what there
    is where that does not decide it."""
    image = _image_column(path, features, image_column)
    text = _caption_column(path, features, caption_column, caption)
    unused = [name for name in picture_columns(features) if name != image]
    unused += [name for name in CAPTION_COLUMNS if name in features and name not in (image, text)]
    notes = [f"columns that are not used: {', '.join(map(shown, unused))}"] if unused else []
    return Columns(image, text, notes)


def _image_column(path: str, features: datasets.Features, asked: str | None) -> str:
    found = picture_columns(features)
    if asked is not None:
        if asked in found or (asked in features and _is_binary(features[asked])):
            return asked
        raise UserError(
            f"data.image_column={asked}: {path} has no such column of pictures, but {_names(found)}"
        )
    usual = [name for name in found if name in PICTURE_COLUMNS]
    for names in (found, usual):
        if len(names) == 1:
            return names[0]
    if found:
        raise UserError(
            f"{path} has several columns of pictures, {_names(found)}: name the one to "
            f"use, data.image_column={found[0]}"
        )
    columns = _names(list(features)) if features else "not known before it is read"
    raise UserError(
        f"{path} has no column of pictures; its columns are {columns}. Name the column, "
        "data.image_column=...; a folder of picture files is read without data.streaming"
    )


def picture_columns(features: datasets.Features) -> list[str]:
    """Those that are marked as pictures, or else those that may well be."""
    from datasets import Image

    marked = [name for name, feature in features.items() if isinstance(feature, Image)]
    if marked:
        return marked
    return [
        name
        for name, feature in features.items()
        if (isinstance(feature, dict) and "bytes" in feature)
        or (name in PICTURE_COLUMNS and _is_binary(feature))
    ]


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _caption_column(
    path: str, features: datasets.Features, asked: str | None, caption: str | None
) -> str | None:
    import pyarrow as pa

    if asked is not None and asked not in features:
        raise UserError(
            f"data.caption_column={asked}: {path} has no such column, but {_names(list(features))}"
        )
    name = asked or next((name for name in CAPTION_COLUMNS if name in features), None)
    if name is None and caption is None:
        raise UserError(
            f"{path} has no column named {', '.join(CAPTION_COLUMNS)}: set data.caption_column to "
            f"one of {_names(list(features))}, or data.caption to one caption for all"
        )
    if name is None:
        return None
    kind = features.arrow_schema.field(name).type
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"{path}: column {name} holds {kind}, not text: set data.caption_column to another of "
            f"{_names(list(features))}"
        )
    return name


def _names(columns: Sequence[str]) -> str:
    return ", ".join(map(shown, columns[:20])) or "none"


def captions(value: Any, default: str | None) -> tuple[str, ...]:
    """A row's captions, white space within them made single spaces. Raises ValueError where there
    are none and no default."""
    texts = value if isinstance(value, list) else [value]
    found = tuple(clean for text in texts if (clean := " ".join((text or "").split())))
    if any("\0" in text for text in found):
        raise ValueError("has a caption that holds NUL, which is no text: mend it")
    if any(len(text) > MAX_TEXT_BYTES for text in found):
        raise ValueError(f"has a caption of more than {MAX_TEXT_BYTES} characters: shorten it")
    if not found and default is None:
        raise ValueError("has no caption: write one, or set data.caption for all such")
    return found or (default or "",)
