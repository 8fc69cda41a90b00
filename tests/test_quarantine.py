"""data/quarantine.py: copies of what cannot be used."""

import os

import pytest

from data.quarantine import quarantine
from data.sources import Rejected, scan
from tests.folders import picture
from train.config import UserError


def test_rejected_files_are_copied_with_their_reasons_once(tmp_path):
    folder, kept = tmp_path / "set", tmp_path / "run" / "quarantine"
    picture(folder / "good.png")
    picture(folder / "sub" / "bad.png").write_bytes(b"hello")
    (folder / "out.png").symlink_to(picture(tmp_path / "elsewhere.png"))
    os.mkfifo(folder / "pipe.png")
    rejected = scan(folder, on_bad="report").rejected
    assert quarantine(rejected, kept) == 1
    assert (kept / "sub" / "bad.png").read_bytes() == b"hello"
    inode = (kept / "sub" / "bad.png").stat().st_ino
    assert quarantine(rejected, kept) == 1
    assert (kept / "sub" / "bad.png").stat().st_ino == inode
    assert {path.name for path in kept.rglob("*")} == {
        "sub",
        "bad.png",
        "reasons.txt",
        ".copies.json",
    }
    reasons = (kept / "reasons.txt").read_text()
    assert "sub/bad.png:\tis not a picture" in reasons and "out.png:\tis a link" in reasons
    assert sorted(path.name for path in folder.rglob("*.png")) == sorted(
        ["good.png", "bad.png", "out.png", "pipe.png"]
    )


def test_a_copy_goes_once_its_file_is_mended_and_nothing_else_does(tmp_path):
    folder, kept = tmp_path / "set", tmp_path / "kept"
    names = ["sub/bad.png", "new\nline.png", "a: b.png", "worse.png", "x" * 250 + ".png"]
    for name in ("good.png", *names):
        picture(folder / name, "x" if len(name) < 99 else None)
    for name in names:
        (folder / name).write_bytes(b"hello")
    assert quarantine(scan(folder, on_bad="report").rejected, kept) == len(names)
    (kept / "sub" / "mine.png").write_text("mine")
    (kept / "notes.txt").write_text("mine")
    for name in names[:3]:
        picture(folder / name)
    assert quarantine(scan(folder, on_bad="report").rejected, kept) == 2
    left = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    ours = {"reasons.txt", ".copies.json"}
    assert left == {*ours, "notes.txt", "sub/mine.png", *names[3:]}
    assert "bad.png" not in (kept / "reasons.txt").read_text()


@pytest.mark.parametrize("id", ["../up.png", "/tmp/up.png", "a/../../up.png", "", "inner/up.png"])
def test_nothing_is_written_outside_the_folder(tmp_path, id):
    source = picture(tmp_path / "source.png")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "inner").symlink_to(tmp_path)
    assert quarantine([Rejected(id, "why", f"file:{source}")], kept) == 0
    assert not (tmp_path / "up.png").exists()


def test_a_pipe_put_there_since_the_scan_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(picture(tmp_path / "a.png"))
    rejected = [Rejected(n, "why", f"file:{tmp_path / n}") for n in ("pipe.png", "link.png", "no")]
    rejected.append(Rejected("row 3", "why", "row:[]"))
    assert quarantine(rejected, tmp_path / "kept") == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="quarantine .*on_bad_image=report"):
        quarantine([], tmp_path / "file" / "kept")


def test_what_somebody_mended_or_put_there_is_never_removed(tmp_path):
    folder, kept = tmp_path / "set", tmp_path / "kept"
    for name in ("good.png", "bad.png"):
        picture(folder / name)
    (folder / "bad.png").write_bytes(b"hello")
    os.mkfifo(folder / "pipe.png")
    quarantine(scan(folder, on_bad="report").rejected, kept)
    picture(kept / "bad.png", None)  # mended there
    picture(kept / "pipe.png", None)  # of that name, but no copy
    for name in ("bad.png", "pipe.png"):
        (folder / name).unlink()
    quarantine(scan(folder, on_bad="report").rejected, kept)
    assert (kept / "bad.png").exists() and (kept / "pipe.png").exists()
