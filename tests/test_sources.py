"""data/sources.py, with listing.py and captions.py: what a folder holds, or what is wrong."""

import hashlib
import json
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data import images, sources
from data.sources import scan
from train.config import UserError


def picture(path: Path, caption: str | None = "a red thing", size=(12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def metadata(folder: Path, *entries: object) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def refusal(folder: Path, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        scan(folder, **arguments)
    return str(caught.value)


def test_sidecars_below_the_folder_sorted_with_facts(tmp_path):
    picture(tmp_path / "b.png", "  two \n lines ")
    picture(tmp_path / "a" / "z.jpg", size=(30, 20))
    picture(tmp_path / "c.PNG", None).with_suffix(".caption").write_bytes(b"\xef\xbb\xbfmarked")
    picture(tmp_path / ".hidden" / "d.png")
    picture(tmp_path / ".e.png")
    (tmp_path / "README.md").write_text("no caption")
    (tmp_path / "notes.txt").write_text("no picture")
    source = scan(tmp_path)
    assert [record.id for record in source.records] == ["a/z.jpg", "b.png", "c.PNG"]
    assert [record.caption for record in source.records] == ["a red thing", "two lines", "marked"]
    first = source.records[0]
    assert (first.width, first.height) == (30, 20)
    assert first.sha256 == hashlib.sha256(first.path.read_bytes()).hexdigest()
    assert ".txt" in source.recognised and "no metadata.jsonl" in source.recognised
    assert any("1 x .md" in note for note in source.notes)
    assert any("notes.txt" in note for note in source.notes)


def test_metadata_wins_and_says_what_it_leaves_out(tmp_path):
    picture(tmp_path / "sub" / "a.png", "from the sidecar")
    picture(tmp_path / "b.png")
    metadata(tmp_path, {"file_name": "sub/a.png", "text": "from metadata", "more": 1}, "")
    source = scan(tmp_path)
    assert [(record.id, record.caption) for record in source.records] == [
        ("sub/a.png", "from metadata")
    ]
    assert "metadata.jsonl" in source.recognised
    assert any("b.png" in note for note in source.notes)


def test_sizes_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=exif)
    record = scan(tmp_path, caption="a").records[0]
    assert (record.width, record.height) == (8, 12)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"file_name": "../out.png", "text": "x"}, "below the folder"),
        ({"file_name": "/etc/passwd", "text": "x"}, "below the folder"),
        ({"file_name": "file:///a.png", "text": "x"}, "below the folder"),
        ({"file_name": "..\\out.png", "text": "x"}, "below the folder"),
        ({"file_name": "gone.png", "text": "x"}, "not in the folder"),
        ({"file_name": "a.png"}, "no caption"),
        ({"file_name": "good.png", "text": "again"}, "second time"),
        ({"file_name": "a.png", "text": 3}, '"text"'),
        ({"name": "a.png"}, '"file_name"'),
        ("[1]", '"file_name"'),
        ('{"file_name": "a.png", ', "metadata.jsonl:2: is not JSON"),
        ("[" * 100_000, "metadata.jsonl:2: is not JSON"),
    ],
)
def test_bad_metadata_is_named_by_line(tmp_path, entry, why):
    picture(tmp_path / "in" / "good.png")
    picture(tmp_path / "in" / "a.png", None)
    picture(tmp_path / "out.png")
    metadata(tmp_path / "in", {"file_name": "good.png", "text": "good"}, entry)
    message = refusal(tmp_path / "in")
    assert why in message and "good.png: " not in message
    assert [record.id for record in scan(tmp_path / "in", on_bad="skip").records] == ["good.png"]


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
    for name in ("empty", "cut", "text", "bomb", "mute", "latin"):
        picture(folder / f"{name}.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:-200])
    (folder / "text.jpg").write_text("hello")
    (folder / "bomb.jpg").write_bytes(png_claiming(60_000, 60_000))
    (folder / "mute.txt").unlink()
    (folder / "latin.txt").write_bytes("schön".encode("latin-1"))
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "out.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "up").symlink_to(tmp_path)
    reasons = {
        "empty.jpg": "has 0 bytes",
        "cut.jpg": "cannot be decoded",
        "text.jpg": "not a picture",
        "bomb.jpg": "more pixels",
        "mute.jpg": "no caption",
        "latin.txt": "not UTF-8",
        "pipe.png": "not a regular file",
        "loop.png": "cannot be reached",
        "out.png": "outside the folder",
        "up": "links to folders",
    }
    lines = refusal(folder).splitlines()
    assert f"({len(reasons)})" in lines[0] and len(lines) == len(reasons) + 1
    for name, why in reasons.items():
        assert any(line.strip().startswith(f"{name}: ") and why in line for line in lines), name
    source = scan(folder, on_bad="skip")
    assert [record.id for record in source.records] == ["good.jpg"]
    assert any("up: links" in note for note in source.notes)


def test_twenty_are_named_and_the_rest_counted(tmp_path):
    for number in range(25):
        picture(tmp_path / f"{number:02}.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "19.png" in message and "20.png" not in message and "and 5 more" in message


def test_folders_without_anything_to_train_on(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    assert "not a folder" in refusal(picture(tmp_path / "some" / "a.png", None))
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refusal(tmp_path / "empty")
    assert "no captions" in refusal(tmp_path / "some")
    assert scan(tmp_path / "some", caption="").records[0].caption == ""
    metadata(tmp_path / "some")
    assert "metadata.jsonl lists no pictures" in refusal(tmp_path / "some")


def test_an_empty_caption_is_none_and_the_default_is_for_those_only(tmp_path):
    picture(tmp_path / "a.png", " \n")
    picture(tmp_path / "b.png", "own")
    assert "a.png: has no caption" in refusal(tmp_path)
    assert [record.caption for record in scan(tmp_path, caption="all").records] == ["all", "own"]


def test_ambiguous_captions_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg", None)
    picture(tmp_path / "b.png").with_suffix(".caption").write_text("other")
    message = refusal(tmp_path)
    assert "a.png: shares a.txt with a.jpg" in message and "b.png: has two captions" in message


def test_names_in_any_unicode_form_and_with_odd_characters(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    picture(tmp_path / decomposed, None)
    picture(tmp_path / "new\nline.png", None)
    metadata(tmp_path, *({"file_name": name, "text": "x"} for name in (composed, "new\nline.png")))
    assert [record.id for record in scan(tmp_path).records] == ["new\nline.png", composed]
    (tmp_path / "new\nline.png").write_bytes(b"")
    assert r"new\nline.png" in refusal(tmp_path)
    picture(tmp_path / composed, None)
    assert "Unicode form" in refusal(tmp_path)


def test_the_second_scan_reads_only_what_changed(tmp_path, monkeypatch):
    folder, index = tmp_path / "set", tmp_path / "cache" / "index.json"
    for name in "abc":
        picture(folder / f"{name}.png")
    read: list[int] = []
    real = images.decode
    monkeypatch.setattr(sources.images, "decode", lambda file: read.append(1) or real(file))
    first = scan(folder, index=index)
    assert len(read) == 3
    assert scan(folder, index=index) == first and len(read) == 3
    changed = picture(folder / "b.png", size=(20, 20))
    os.utime(changed, ns=(1, 1))
    again = scan(folder, index=index)
    assert len(read) == 4 and again.records[1].width == 20
    assert [again.records[at] for at in (0, 2)] == [first.records[at] for at in (0, 2)]
    assert [path.name for path in index.parent.iterdir()] == ["index.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1, "files": {"a.png": [1]}}'])
def test_a_damaged_index_is_made_anew(tmp_path, content):
    picture(tmp_path / "set" / "a.png")
    index = tmp_path / "index.json"
    index.write_text(content)
    assert len(scan(tmp_path / "set", index=index).records) == 1
    assert len(json.loads(index.read_text())["files"]["a.png"]) == 5


def test_progress_counts_the_pictures(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    seen: list[tuple[int, int]] = []
    scan(tmp_path, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]
