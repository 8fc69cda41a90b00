"""data/sources.py, with listing.py and captions.py: what a folder holds, or what is wrong."""

import hashlib
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data.listing import list_folder
from data.sources import scan
from tests.folders import found, metadata, picture, refusal


def test_sidecars_below_the_folder_sorted_with_facts(tmp_path):
    picture(tmp_path / "b.png", "  one  line \r\n\r\n another\n")
    picture(tmp_path / "a" / "z.jpg", size=(30, 20))
    picture(tmp_path / "c.PNG", None).with_suffix(".caption").write_bytes(b"\xef\xbb\xbfmarked")
    picture(tmp_path / ".hidden" / "d.png")
    picture(tmp_path / ".e.png")
    (tmp_path / "README.md").write_text("no caption")
    (tmp_path / "notes.txt").write_text("no picture")
    source = scan(str(tmp_path))
    assert [record.id for record in source.table] == ["a/z.jpg", "b.png", "c.PNG"]
    assert source.table.column("captions") == [["a red thing"], ["one line", "another"], ["marked"]]
    first = source.table[0]
    assert (first.width, first.height, first.file_bytes) == (30, 20, first.path.stat().st_size)
    assert first.sha256 == hashlib.sha256(first.read()).hexdigest()
    assert ".txt" in source.recognised and "no metadata.jsonl" in source.recognised
    for note in ("1 x .md", "notes.txt", "each line a caption of its own (1): b.png"):
        assert any(note in line for line in source.notes), note


def test_pairs_of_images_and_texts(tmp_path):
    picture(tmp_path / "images" / "a.png", None)
    picture(tmp_path / "images" / "sub" / "b.jpg", "beside it")
    picture(tmp_path / "other.png")
    for name, text in (("texts/a.txt", "one"), ("texts/sub/b.caption", "two"), ("texts/c.txt", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    source = scan(tmp_path)
    assert [(record.id, record.captions) for record in source.table] == [
        ("images/a.png", ("one",)),
        ("images/sub/b.jpg", ("two",)),
    ]
    assert "texts/" in source.recognised
    notes = "\n".join(source.notes)
    assert "outside images/" in notes and "other.png" in notes
    assert "texts/c.txt" in notes and "images/sub/b.txt" in notes
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "a.txt").write_text("three")
    assert "images/a.png: has two captions" in refusal(tmp_path)


def test_a_texts_folder_of_something_else_does_not_hide_the_sidecars(tmp_path):
    picture(tmp_path / "images" / "a.png", "beside it")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "licence.txt").write_text("MIT")
    assert found(tmp_path) == {"images/a.png": ("beside it",)}


def test_one_caption_for_all(tmp_path):
    picture(tmp_path / "a.png", None)
    source = scan(tmp_path, caption="a dog")
    assert source.table[0].captions == ("a dog",) and "data.caption for all" in source.recognised
    assert scan(tmp_path, caption="").table[0].captions == ("",)


def test_an_empty_caption_is_none_and_the_default_is_for_those_only(tmp_path):
    picture(tmp_path / "a.png", " \n")
    picture(tmp_path / "b.png", "own")
    assert "a.png: has no caption" in refusal(tmp_path)
    source = scan(tmp_path, caption="all")
    assert [record.captions for record in source.table] == [("all",), ("own",)]
    assert any("data.caption as their caption (1): a.png" in note for note in source.notes)


def test_ambiguous_captions_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg", None)
    picture(tmp_path / "b.png").with_suffix(".caption").write_text("other")
    message = refusal(tmp_path)
    assert "a.png: shares a.txt with a.jpg" in message and "b.png: has two captions" in message


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("schön".encode("latin-1"), "a.txt is not UTF-8 (byte 3)"),
        ("plain".encode("utf-16"), "a.txt holds NUL"),
        (b"x" * (1 << 17), "a.txt has more than 65536 bytes"),
    ],
)
def test_a_text_that_is_none_names_picture_and_file(tmp_path, content, why):
    picture(tmp_path / "a.png").with_suffix(".txt").write_bytes(content)
    picture(tmp_path / "b.png")
    line = next(line for line in refusal(tmp_path).splitlines() if "a.png" in line)
    assert why in line


def test_sizes_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (120, 80)).save(tmp_path / name, exif=exif)
    table = scan(tmp_path, caption="a").table
    assert list(zip(table.widths, table.heights, strict=True)) == [(80, 120)] * 2


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99))


def test_every_bad_file_is_named_with_its_reason(tmp_path):
    folder = tmp_path / "set"
    good = picture(folder / "good.jpg", size=(64, 64))
    picture(tmp_path / "elsewhere.png")
    for name in ("empty", "cut", "text", "bomb", "mute"):
        picture(folder / f"{name}.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:-200])
    (folder / "text.jpg").write_text("hello")
    (folder / "bomb.jpg").write_bytes(png_claiming(60_000, 60_000))
    (folder / "mute.txt").unlink()
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "out.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.jpg").symlink_to("good.jpg")
    (folder / "inside.txt").write_text("linked")
    picture(folder / os.fsdecode(b"caf\xe9.png"), None)
    reasons = {
        "empty.jpg": "is empty",
        "cut.jpg": "cannot be decoded",
        "text.jpg": "not a picture",
        "bomb.jpg": "more pixels",
        "mute.jpg": "no caption",
        "phone.heic": "HEIC",
        "pipe.png": "not a regular file",
        "loop.png": "cannot be reached",
        "out.png": "outside the folder",
        "up": "links to folders",
        "caf\\udce9.png": "not UTF-8: rename",
    }
    lines = refusal(folder).splitlines()
    assert f"{len(reasons)} cannot be used" in lines[0] and "on_bad_image=report" in lines[0]
    assert len(lines) == len(reasons) + 1
    for name, why in reasons.items():
        assert any(line.strip().startswith(f"{name}: ") and why in line for line in lines), name
    source = scan(folder, on_bad="report")
    assert [record.id for record in source.table] == ["good.jpg", "inside.jpg"]
    assert {bad.id for bad in source.rejected} == reasons.keys()
    readable = {bad.id: bad.location for bad in source.rejected if bad.location}
    assert readable["cut.jpg"] == f"file:{folder / 'cut.jpg'}"
    assert readable.keys().isdisjoint({"pipe.png", "loop.png", "out.png", "up"})
    assert any("left out (11)" in note and "up: links" in note for note in source.notes)


def test_twenty_are_named_and_the_rest_counted(tmp_path):
    for number in range(25):
        picture(tmp_path / f"{number:02}.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "19.png" in message and "20.png" not in message and "and 5 more" in message
    assert message.splitlines()[1:] == refusal(tmp_path, on_bad="report").splitlines()[1:]


def test_folders_without_anything_to_train_on(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    assert "not a folder" in refusal(picture(tmp_path / "some" / "a.png", None))
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refusal(tmp_path / "empty")
    assert "no captions" in refusal(tmp_path / "some")
    metadata(tmp_path / "some")
    assert "metadata.jsonl lists no pictures" in refusal(tmp_path / "some")


def test_names_in_any_unicode_form_and_with_odd_characters(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    picture(tmp_path / decomposed, "accented")
    picture(tmp_path / "new\nline.png", "broken")
    table = scan(tmp_path).table
    assert [record.id for record in table] == ["new\nline.png", composed]
    assert [record.captions for record in table] == [("broken",), ("accented",)]
    assert table[1].path == tmp_path / decomposed
    (tmp_path / "new\nline.png").write_bytes(b"")
    assert r"new\nline.png" in refusal(tmp_path)
    picture(tmp_path / composed, None)
    assert "Unicode form" in refusal(tmp_path)


def test_what_has_the_same_stem_is_found_among_names_that_sort_between(tmp_path):
    names = ["a.txt", "a-b.png", "a.b.png", "a.d/c.png", "a.png", "a0.png", "aa.png"]
    for name in names:
        picture(tmp_path / name, None) if name.endswith("png") else (tmp_path / name).write_text(
            "x"
        )
    listing = list_folder(tmp_path)
    assert listing.names == sorted(names)
    assert listing.with_stem("a") == ["a.png", "a.txt"]
    assert listing.files["a.d/c.png"] == Path(tmp_path / "a.d" / "c.png") and "a" not in listing


def test_a_folder_named_like_a_picture_is_said(tmp_path):
    picture(tmp_path / "x.jpg" / "a.png")
    source = scan(tmp_path)
    assert [record.id for record in source.table] == ["x.jpg/a.png"]
    assert any("x.jpg is a folder" in note for note in source.notes)


def test_progress_counts_the_pictures(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    seen: list[tuple[int, int]] = []
    scan(tmp_path, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_folder_whose_path_is_not_utf8_is_refused(tmp_path):
    folder = tmp_path / os.fsdecode(b"set\xff")
    picture(folder / "a.png")
    assert "set\\udcff is a path that is not UTF-8: rename" in refusal(folder)


def test_notes_can_be_written_down_whatever_the_names_are(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / os.fsdecode(b"b.\xff")).write_text("")
    "\n".join(scan(tmp_path).notes).encode()
