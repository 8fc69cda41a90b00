"""metadata.jsonl, .csv and .parquet, captions and focus points: a scan takes the pictures that can
be used, names the others, and never looks outside the folder."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from data.sources import scan
from tests.fuzz.mutations import odd, odd_texts, scalars, spoilt
from tests.fuzz.watch import outcome

PICTURES = ("a.png", "b.png", "sub/c.png", "\u00e9.png")
KEYS = ["file_name", "text", "caption", "captions", "prompt", "focus", "mask", "depth"]
ENTRIES: list[dict[str, Any]] = [
    {"file_name": "a.png", "text": "a red circle", "focus": [0.5, 0.25]},
    {"file_name": "b.png", "text": ["one", "two"], "mask": "sub/c.png"},
    {"file_name": "sub/c.png", "caption": "caf\u00e9", "depth": "a.png"},
    {"file_name": "e\u0301.png", "prompt": "x", "focus": {"x": 1, "y": 0}},
    {"file_name": "../outside.png", "text": "never"},
    {"file_name": "link.png", "text": "never"},
]


@dataclass(frozen=True)
class Example:
    name: str
    """Of the file."""
    content: bytes
    caption: str | None
    column: str | None
    beside: bool
    """Whether masks and depth maps are looked for."""


@st.composite
def examples(draw: st.DrawFn) -> Example:
    kinds = {
        "metadata.jsonl": _jsonl,
        "metadata.csv": _csv,
        "metadata.parquet": _parquet,
        "a.txt": lambda draw: draw(odd_texts).encode("utf-8", "surrogatepass"),
        "a.focus.json": lambda draw: json.dumps(
            draw(odd(ENTRIES[3]["focus"], ["x", "y"]))
        ).encode(),
    }
    name = draw(st.sampled_from(sorted(kinds)))
    content = draw(spoilt(kinds[name](draw)))
    caption = draw(st.sampled_from([None, "", "a picture"]))
    column = draw(st.sampled_from([None, None, "text", "alt"]))
    return Example(name, content, caption, column, draw(st.booleans()))


def _entries(draw: st.DrawFn) -> list[Any]:
    chosen = draw(st.lists(st.sampled_from(ENTRIES), min_size=1, max_size=5))
    return [draw(odd(entry, KEYS)) for entry in chosen]


def _jsonl(draw: st.DrawFn) -> bytes:
    return "\n".join(json.dumps(entry) for entry in _entries(draw)).encode()


def _csv(draw: st.DrawFn) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    head = draw(st.permutations(KEYS))[: draw(st.integers(1, 6))]
    writer.writerow(draw(st.sampled_from([["file_name", "text"], [*head, "file_name"], head])))
    for _ in range(draw(st.integers(0, 4))):
        cells = draw(st.lists(st.sampled_from(PICTURES) | scalars, max_size=4))
        writer.writerow(cells)
    return file.getvalue().encode("utf-8", "surrogatepass")


def _parquet(draw: st.DrawFn) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    names = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4))
    count = draw(st.integers(0, 4))
    kinds = {
        pa.string(): st.sampled_from([*PICTURES, "../outside.png", "a cat", ""]),
        pa.int64(): st.integers(-1, 1),
        pa.float64(): st.floats(),
        pa.binary(): st.binary(max_size=5),
        pa.list_(pa.string()): st.lists(st.sampled_from(PICTURES), max_size=2),
        pa.list_(pa.float64()): st.lists(st.floats(), max_size=3),
        pa.timestamp("ns"): st.integers(0, 2**62),
        pa.duration("ns"): st.integers(0, 2**62),
    }
    columns = []
    for name in names:
        usual = pa.string() if name != "focus" else pa.list_(pa.float64())
        kind = draw(st.sampled_from([usual, usual, *kinds]))
        column = draw(st.lists(st.none() | kinds[kind], min_size=count, max_size=count))
        columns.append(pa.array(column, kind))
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(columns, names), file)
    return file.getvalue()


def prepare(folder: Path) -> None:
    """The pictures that all examples share, and one beside them that none may reach."""
    for name in PICTURES:
        path = folder / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 0, 0)).save(path)
    Image.new("RGB", (9, 9)).save(folder / "outside.png")
    (folder / "set" / "link.png").symlink_to(folder / "outside.png")


def check(example: Example, folder: Path) -> None:
    """The property. `folder` as `prepare` makes it."""
    if not (folder / "set").exists():
        prepare(folder)
    file = folder / "set" / example.name
    file.write_bytes(example.content)
    try:
        source = outcome(
            lambda: scan(
                folder / "set",
                on_bad="report",
                caption=example.caption,
                caption_column=example.column,
                masks=example.beside,
                depth=example.beside and example.caption == "",
            )
        )
    finally:
        file.unlink()
    if source is None:
        return
    inside = (folder / "set").resolve()
    for record in source.table:
        for path in (record.path, record.mask, record.depth):
            assert path is None or Path(path).resolve().is_relative_to(inside), record
        assert record.captions and record.width == record.height == 8
        for caption in record.captions:
            assert "\0" not in caption and "\n" not in caption and len(caption.encode()) <= 1 << 19
    for bad in source.rejected:
        f"{bad.id}{bad.reason}".encode()
    "".join(source.notes).encode()


def forget(folder: Path) -> None:
    shutil.rmtree(folder / "set", ignore_errors=True)
