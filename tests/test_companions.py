"""data/companions.py: masks, depth maps and focus points."""

import hashlib
import json

import pytest
from PIL import Image

from data.companions import is_companion
from data.listing import list_folder
from data.sources import scan
from tests.folders import found, metadata, picture, refusal


def grey(path, size=(12, 8), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 200).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("a.jpg", "a.mask.png"),
        ("a.jpg", "a-masklabel.png"),
        ("a.jpg", "masks/a.webp"),
        ("sub/a.jpg", "masks/sub/a.png"),
        ("sub/a.jpg", "sub/masks/a.jpg"),
        ("images/sub/a.jpg", "masks/sub/a.png"),
        ("images/a.jpg", "masks/images/a.png"),
    ],
)
def test_a_mask_is_found_and_is_no_picture(tmp_path, name, mask):
    picture(tmp_path / name)
    grey(tmp_path / mask)
    (record,) = scan(tmp_path, masks=True).table
    assert record.id == name and record.mask == str(tmp_path / mask)
    assert record.mask_sha256 == hashlib.sha256((tmp_path / mask).read_bytes()).hexdigest()
    source = scan(tmp_path, caption="x")
    assert [record.mask for record in source.table] == [None]
    assert any(f"not taken as pictures (1): {mask}" in note for note in source.notes)


def test_what_is_named_like_a_companion_of_nothing_is_a_picture(tmp_path):
    for name in ("masks/a.png", "b.mask.png", "c.depth.png", "depth.png", "mask.png"):
        picture(tmp_path / name)
    source = scan(tmp_path)
    assert len(source.table) == 5
    note = next(note for note in source.notes if "no picture here" in note)
    assert "b.mask.png" in note and "masks/a.png" in note and " depth.png" not in note
    assert not is_companion(list_folder(tmp_path), "depth.png")


def test_a_missing_mask_is_counted_and_a_missing_depth_map_refused(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    grey(tmp_path / "a.mask.png")
    grey(tmp_path / "depth" / "a.png", mode="I;16")
    source = scan(tmp_path, masks=True)
    assert [record.mask is None for record in source.table] == [False, True]
    assert any("without a mask" in note and "(1): b.png" in note for note in source.notes)
    assert "b.png: has no depth map" in refusal(tmp_path, depth=True)
    assert "scripts/depth.py" in refusal(tmp_path, depth=True)
    (record,) = scan(tmp_path, depth=True, masks=True, on_bad="report").table
    assert record.depth == str(tmp_path / "depth" / "a.png") and record.mask is not None


def test_companions_that_cannot_serve_reject_their_picture(tmp_path):
    for name in ("broken", "twice", "square", "near", "good"):
        picture(tmp_path / f"{name}.png", size=(300, 200))
        grey(tmp_path / f"{name}.mask.png", size=(75, 50))
    (tmp_path / "broken.mask.png").write_bytes(b"hello")
    grey(tmp_path / "masks" / "twice.png")
    grey(tmp_path / "square.mask.png", size=(50, 50))
    grey(tmp_path / "near.mask.png", size=(74, 50))
    result = found(tmp_path, masks=True)
    assert "its mask broken.mask.png is not a picture" in result["broken.png"][0]
    assert "more than one mask, twice.mask.png and masks/twice.png" in result["twice.png"][0]
    assert "300x200" in result["square.png"][0] and "50x50" in result["square.png"][0]
    assert result["good.png"] == result["near.png"] == ("a red thing",)
    assert len(result) == 5


def test_a_mask_is_compared_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(tmp_path / "a.jpg", exif=exif)
    grey(tmp_path / "a.mask.png", size=(20, 30))
    assert len(scan(tmp_path, masks=True, caption="x").table) == 1


def test_only_an_edited_mask_is_read_again(tmp_path, monkeypatch):
    from data import examine

    folder, index = tmp_path / "set", tmp_path / "cache" / "index.arrow"
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png")
        grey(folder / f"{name}.mask.png")
    (folder / "b.mask.png").unlink()
    read: list[int] = []
    real = examine.decoded_size
    monkeypatch.setattr(examine, "decoded_size", lambda c: read.append(1) or real(c))
    first = scan(folder, index=index, masks=True)
    assert len(read) == 5
    assert list(scan(folder, index=index, masks=True).table) == list(first.table)
    assert len(read) == 5
    grey(folder / "c.mask.png", size=(24, 16))
    again = scan(folder, index=index, masks=True).table
    assert len(read) == 6 and again[2].mask_sha256 != first.table[2].mask_sha256
    assert all(record.mask is None for record in scan(folder, index=index).table) and len(read) == 6


def test_a_focus_beside_the_picture_and_in_metadata(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "a.focus.json").write_text(json.dumps({"x": 0.2, "y": 1}))
    assert [record.focus for record in scan(tmp_path).table] == [(0.2, 1.0), None]
    entries = [{"file_name": "a.png", "text": "x"}]
    metadata(tmp_path, *entries, {"file_name": "b.png", "text": "x", "focus": [0, 0.5]})
    assert [record.focus for record in scan(tmp_path).table] == [(0.2, 1.0), (0.0, 0.5)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"x": 0.5}', '{"x": 2, "y": 0}', '{"x": NaN, "y": 0}', "\xff" * 9]
)
def test_a_bad_focus_is_named(tmp_path, content):
    picture(tmp_path / "a.png")
    (tmp_path / "a.focus.json").write_text(content, encoding="latin-1")
    assert "a.png: a.focus.json" in refusal(tmp_path)


def test_depth_maps_of_a_dataset_are_refused_before_it_is_opened():
    assert "folders of pictures only" in refusal("hf:someone/something", depth=True)
