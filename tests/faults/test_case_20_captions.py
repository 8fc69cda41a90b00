"""Case 20: captions that are missing, empty, too long, of bytes that are no UTF-8, marked or with
NUL -> each is named, or given the common caption where there is one; all are counted."""

import json

import pytest

from tests.faults.hostile import picture
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "a picture without a caption is refused",
        "data/sources.py",
        'raise ValueError("has no caption: write one, or set data.caption for all such")',
        'return ("",)',
        "without",
    ),
    Removal(
        "NUL in a text is refused",
        "data/listing.py",
        'if b"\\0" in content:',
        "if False:",
        "without",
    ),
    Removal(
        "a text has a largest size",
        "data/listing.py",
        "if len(content) > MAX_TEXT_BYTES:",
        "if False:",
        "without",
    ),
    Removal(
        "a mark at the beginning is no part of a caption",
        "data/listing.py",
        'return content.decode("utf-8-sig")',
        'return content.decode("utf-8")',
        "without",
    ),
    Removal(
        "captions that are cut are counted",
        "data/checks.py",
        "            if tokens > max_tokens:",
        "            if False:",
        "without",
    ),
]
LONG = " ".join(["word"] * 90)
TEXTS = {
    "good": b"a red dot",
    "several": b"a dot\n\n  a red \t dot \r\na thing",
    "marked": b"\xef\xbb\xbfa marked dot",
    "long": LONG.encode(),
    "missing": None,
    "empty": b"",
    "blank": b" \n\t\r\n ",
    "latin": "caf\u00e9".encode("latin-1"),
    "sixteen": "a dot".encode("utf-16"),
    "nul": b"a dot\0 and more",
    "huge": b"x" * 70_000,
}
REFUSED = {
    "latin.png": "is not UTF-8",
    "sixteen.png": "UTF-8",
    "nul.png": "holds NUL",
    "huge.png": "has more than 65536 bytes",
}
MISSING = ("missing.png", "empty.png", "blank.png")


@pytest.fixture
def folder(tmp_path):
    for number, (name, text) in enumerate(TEXTS.items()):
        path = picture(tmp_path / "set" / f"{name}.png", (20 * number, 200 - 9 * number, 30), None)
        if text is not None:
            path.with_suffix(".txt").write_bytes(text)
    return tmp_path / "set"


def prepared(starter, folder, output, *more):
    """report.json, and the captions by picture."""
    args = (f"source={folder}", f"output={output}", "duplicates=off", *more)
    said = starter.finish("scripts/prepare.py", *args)
    report = json.loads((output / "report.json").read_text("utf-8"))
    lines = (output / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
    return said, report, {line["file_name"]: line["text"] for line in map(json.loads, lines)}


def test_without_a_common_caption_they_are_refused_and_counted(starter, folder, tmp_path):
    said, report, captions = prepared(starter, folder, tmp_path / "out")
    reasons = {each["id"]: each["reason"] for each in report["rejected"]}
    expected = REFUSED | dict.fromkeys(MISSING, "has no caption")
    assert reasons.keys() == expected.keys()
    assert [name for name, words in expected.items() if words not in reasons[name]] == []
    assert report["counts"]["rejected"] == len(expected) and report["counts"]["train"] == 4
    assert captions["several.png"] == ["a dot", "a red dot", "a thing"]
    assert captions["marked.png"] == "a marked dot"
    assert report["captions"]["cut"] == 1
    assert report["captions"]["longest_cut"][0]["id"] == "long.png"
    assert any("of several lines" in note and "several.png" in note for note in report["notes"])


def test_a_common_caption_is_given_to_those_that_have_none(starter, folder, tmp_path):
    _, report, captions = prepared(starter, folder, tmp_path / "out", "caption=a common dot")
    assert {each["id"] for each in report["rejected"]} == REFUSED.keys()
    assert {name for name, texts in captions.items() if texts == "a common dot"} == set(MISSING)
    assert any("(3): " in n and "missing.png" in n for n in report["notes"])


def test_a_run_names_them_or_leaves_them_out(starter, world, folder, tmp_path):
    run = arguments(world, tmp_path / "run", f"data.path={folder}")
    said = starter.finish("train/lora.py", *run, code=2)
    assert "7 cannot be used" in said
    assert [name for name in (*REFUSED, *MISSING) if f"{name}: " not in said] == []
    how = ("data.on_bad_image=report", "data.caption=a dot", "dry_run=true")
    said = starter.finish("train/lora.py", *run, *how)
    assert "7 pictures" in said and "left out (4)" in said
    assert "captions of more than 75" in said and "long.png" in said
