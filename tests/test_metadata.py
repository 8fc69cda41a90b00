"""data/metadata.py: metadata.jsonl, .csv and .parquet."""

import json
import unicodedata

import pytest

from data import metadata as module
from data.sources import scan
from tests.folders import found, metadata, picture, refusal


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png"):
        picture(tmp_path / name, None)
    return tmp_path


def rows(folder, entries, kind):
    """The same entries in any of the three kinds of file."""
    if kind == "jsonl":
        metadata(folder, *entries)
    elif kind == "csv":
        import csv

        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "focus"])
            writer.writeheader()
            writer.writerows(entries)
    else:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(entries), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_each_kind_gives_captions_and_focus(folder, kind):
    focus = "[0.25, 1]" if kind == "csv" else [0.25, 1.0]
    entries = [
        {"file_name": "sub/c.png", "text": ' a "quoted", \n long one', "focus": focus},
        {"file_name": "a.png", "text": "short", "focus": None},
    ]
    rows(folder, entries, kind)
    source = scan(folder)
    assert [(record.id, record.captions, record.focus) for record in source.table] == [
        ("a.png", ("short",), None),
        ("sub/c.png", ('a "quoted", long one',), (0.25, 1.0)),
    ]
    assert f"metadata.{kind}" in source.recognised
    assert any("does not list, not used (1): b.png" in note for note in source.notes)


def test_several_captions_and_other_names_for_them(folder):
    metadata(
        folder,
        {"file_name": "a.png", "text": ["one", " ", "two"], "prompt": "not this"},
        {"file_name": "b.png", "prompt": "three"},
        {"file_name": "sub/c.png", "alt": "four", "text": "five"},
    )
    assert list(found(folder).values()) == [("one", "two"), ("three",), ("five",)]
    assert found(folder, caption_column="alt", caption="x")["sub/c.png"] == ("four",)


def test_it_wins_over_the_texts_and_says_so(folder):
    picture(folder / "a.png", "from the sidecar")
    metadata(folder / "sub", {"file_name": "c.png", "text": "nested"})
    metadata(folder, {"file_name": "a.png", "text": "from metadata"})
    source = scan(folder)
    assert source.table[0].captions == ("from metadata",)
    notes = "\n".join(source.notes)
    assert "text files, not used" in notes and "a.txt" in notes
    assert "below the folder are not read" in notes and "sub/metadata.jsonl" in notes


def test_two_at_once_are_refused(folder):
    metadata(folder, {"file_name": "a.png", "text": "x"})
    (folder / "metadata.csv").write_text("file_name,text\na.png,x\n")
    assert "metadata.jsonl and metadata.csv" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"file_name": "../out.png", "text": "x"}, "below the folder"),
        ({"file_name": "/etc/passwd", "text": "x"}, "below the folder"),
        ({"file_name": "file:///a.png", "text": "x"}, "below the folder"),
        ({"file_name": "..\\out.png", "text": "x"}, "below the folder"),
        ({"file_name": "link.png", "text": "x"}, "link to outside"),
        ({"file_name": "gone.png", "text": "x"}, "not in the folder"),
        ({"file_name": "note.txt", "text": "x"}, "no picture"),
        ({"file_name": "b.png", "text": "again"}, "second time"),
        ({"name": "a.png"}, '"file_name"'),
        ("[1]", '"file_name"'),
        ('{"file_name": "a.png", ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("x" * (1 << 21), "more than 1048576 bytes"),
        ({"file_name": "a.png", "text": 3}, '"text"'),
        ({"file_name": "a.png", "text": "\ud800"}, "not UTF-8"),
        ({"file_name": "a.png", "text": "nul\0"}, "holds NUL"),
        ({"file_name": "a.png", "text": "x", "focus": [0.5]}, "each from 0 to 1"),
        ({"file_name": "a.png", "text": "x", "focus": [0.5, 1.5]}, "each from 0 to 1"),
        ({"file_name": "a.png", "text": "x", "focus": [True, False]}, "each from 0 to 1"),
        ({"file_name": "a.png", "text": "x", "mask": "../out.png"}, "mask ../out.png must be"),
        ({"file_name": "a.png", "text": "x", "depth": "gone.png"}, "depth gone.png is not in"),
    ],
)
def test_a_bad_line_is_named_and_the_others_serve(folder, tmp_path_factory, entry, why):
    outside = picture(tmp_path_factory.mktemp("out") / "out.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "note.txt").write_text("x")
    metadata(folder, {"file_name": "b.png", "text": "good"}, entry)
    line = next(line for line in refusal(folder).splitlines() if why in line and ":2: " in line)
    assert "metadata.jsonl:2: " in line
    assert found(folder)["b.png"] == ("good",)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"a.png,sch\xf6n", "metadata.csv:3: "),
        (b'a.png,"no end', "is not CSV"),
        (b'a.png,"x"y', "is not CSV"),
        (b"a.png,one,two", "more cells"),
        (b"a.png," + b"x" * 200_000, "is not CSV (field larger"),
        (b"a.png," + b"x" * 100_000, "more than 65536"),
    ],
)
def test_a_bad_row_of_a_csv_is_named(folder, row, why):
    content = b"file_name,text\nb.png,good\n" + row + b"\n"
    (folder / "metadata.csv").write_bytes(content)
    assert why in refusal(folder) and "metadata.csv:3" in refusal(folder)
    assert found(folder)["b.png"] == ("good",)


def test_files_that_are_no_metadata(folder):
    (folder / "metadata.csv").write_text("name;text\na.png;x\n")
    assert "needs a column file_name" in refusal(folder) and "name;text" in refusal(folder)
    (folder / "metadata.csv").unlink()
    (folder / "metadata.parquet").write_bytes(b"PAR1 but no more")
    assert "metadata.parquet is not a parquet file" in refusal(folder)


def test_names_in_any_unicode_form(folder):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    picture(folder / decomposed, None)
    picture(folder / "new\nline.png", None)
    metadata(folder, *({"file_name": name, "text": "x"} for name in (composed, "new\nline.png")))
    assert [record.id for record in scan(folder).table] == ["new\nline.png", composed]


def test_companions_it_names_are_used_and_are_no_pictures(folder):
    picture(folder / "white.png", None)
    picture(folder / "a.mask.png", None)
    metadata(folder, {"file_name": "a.png", "text": "x", "mask": "white.png"})
    source = scan(folder, masks=True)
    assert source.table[0].mask == str(folder / "white.png")
    assert any("not used (2): b.png; sub/c.png" in note for note in source.notes)


def test_many_entries_go_to_a_file(folder, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    entries = [{"file_name": name, "text": name * 9} for name in ("sub/c.png", "b.png", "a.png")]
    metadata(folder, *map(json.dumps, entries))
    assert found(folder) == {name: (name * 9,) for name in ("a.png", "b.png", "sub/c.png")}


def test_a_picture_without_text_has_no_caption(folder):
    metadata(folder, {"file_name": "a.png"}, {"file_name": "b.png", "text": [" "]})
    assert {why for (why,) in found(folder, caption="x").values()} == {"x"}
    message = refusal(folder)
    assert "a.png: has no caption" in message and "b.png: has no caption" in message


def test_a_caption_column_that_is_nowhere_is_refused(folder):
    metadata(folder, {"file_name": "a.png", "text": "x"}, {"file_name": "b.png"})
    assert "caption_column=nope: no line" in refusal(folder, caption_column="nope", caption="y")
    assert found(folder, caption_column="text", caption="y")["b.png"] == ("y",)


def test_an_empty_cell_gives_way_to_a_filled_one(folder):
    (folder / "metadata.csv").write_text("file_name,text,caption\na.png, ,filled\nb.png,x,y\n")
    assert found(folder) == {"a.png": ("filled",), "b.png": ("x",)}


def test_a_column_that_is_there_twice_is_refused(folder):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (folder / "metadata.csv").write_text("file_name,,text,,text\na.png,,x,,y\n")
    assert "metadata.csv has more than one column text" in refusal(folder)
    (folder / "metadata.csv").unlink()
    table = pa.table([["a.png"], ["x"], ["y"]], names=["file_name", "text", "text"])
    parquet.write_table(table, folder / "metadata.parquet")
    assert "metadata.parquet has more than one column text" in refusal(folder)


def test_a_parquet_row_that_is_not_utf8_is_named(folder):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    texts = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    table = pa.table({"file_name": ["a.png", "b.png"], "text": texts})
    parquet.write_table(table, folder / "metadata.parquet")
    assert "metadata.parquet:2: is not UTF-8" in refusal(folder)
    assert found(folder)["a.png"] == ("fine",)


def test_a_backslash_may_stand_in_a_name_that_is_there(folder):
    picture(folder / "a\\b.png", None)
    metadata(folder, {"file_name": "a\\b.png", "text": "x"}, {"file_name": "sub\\c.png"})
    assert found(folder)["a\\b.png"] == ("x",)
    assert "sub\\c.png must be a path below" in refusal(folder)
