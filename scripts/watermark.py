"""Finds the invisible watermarks that scripts/generate.py put into pictures (watermark=TEXT).

    python scripts/watermark.py pictures=out
    python scripts/watermark.py pictures=downloaded.jpg

Pictures may have been compressed, cropped or resized since. What is not marked is taken for marked
once in two million pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from train import screens
from train.config import Section, UserError, command, load


class WatermarkConfig(Section):
    """Watermarks in pictures (scripts/watermark.py)."""

    pictures: Path
    """A picture, or a folder of some."""
    format: Literal["table", "json"] = "table"
    """JSON has a line for each picture."""


def main(arguments: list[str]) -> None:
    config = load(WatermarkConfig, arguments)
    marked = count = 0
    for file in files(config.pictures):
        found = look(file)
        marked, count = marked + (found["watermark"] is not None), count + 1
        print(json.dumps(found) if config.format == "json" else _line(found), flush=True)
    if config.format == "table":
        print(f"watermarks in {marked} of {count} pictures")
    screens.done(config.pictures, pictures=count, marked=marked)


def files(pictures: Path) -> list[Path]:
    """The pictures of a file or a folder. Raises UserError where there is none."""
    from data.listing import list_folder

    if pictures.is_file():
        return [pictures]
    try:
        found = [pictures / name for name in list_folder(pictures).pictures]
    except UserError as error:
        raise UserError(str(error).replace("data.path=", "pictures=")) from None
    if not found:
        raise UserError(f"pictures={pictures} holds no pictures")
    return found


def look(file: Path) -> dict[str, Any]:
    """What is in a picture: its watermark or None; and where it cannot be read, why."""
    import numpy as np

    from data.images import open_image
    from eval import watermark

    try:
        pixels = np.asarray(open_image(file))
    except Exception as error:  # whatever Pillow raises for what is no picture
        why = " ".join(str(error).split()) or type(error).__name__
        return {"file": str(file), "watermark": None, "error": why}
    found = watermark.examine(pixels)
    text = None if found.payload is None else found.payload.decode("utf-8", "backslashreplace")
    return {
        "file": str(file),
        "watermark": text,
        "score": round(found.score, 1),
        "scale": round(found.scale, 3),
    }


def _line(found: dict[str, Any]) -> str:
    return "  ".join(_words(found))


def _words(found: dict[str, Any]) -> Iterator[str]:
    yield found["file"]
    if "error" in found:
        yield f"cannot be read ({found['error']})"
    elif found["watermark"] is None:
        yield "-"
    else:
        yield f"{found['watermark']!r} at scale {found['scale']}, score {found['score']}"


if __name__ == "__main__":
    command(main)
