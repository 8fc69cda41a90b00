"""Folders of pictures for tests of what is found in them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data.sources import scan
from train.config import UserError


def picture(path: Path, caption: str | None = "a red thing", size=(12, 8)) -> Path:
    """A picture with a text file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def metadata(folder: Path, *entries: object) -> None:
    """metadata.jsonl; strings are lines as they stand."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def refusal(folder: Path, **arguments) -> str:
    """What a scan raises."""
    with pytest.raises(UserError) as caught:
        scan(folder, **arguments)
    return str(caught.value)


def found(folder: Path, **arguments) -> dict[str, tuple[str, ...]]:
    """The captions of the pictures that can be used, and every rejected id with its reason."""
    source = scan(folder, on_bad="report", **arguments)
    captions = {record.id: record.captions for record in source.table}
    return captions | {bad.id: (bad.reason,) for bad in source.rejected}
