"""The pictures of the embedded defaults."""

import hashlib

from data.sources import scan
from scripts.toy import demo_data


def test_held_out_views_of_the_subject_are_named_alike_and_other_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "TRAINING", 2)
    monkeypatch.setattr(demo_data, "HELD_OUT", 2)
    demo_data.main([f"output={tmp_path}"])
    for folder, name in (("owl", " owl circle on a "), ("owl-token", " <owl> on a ")):
        trained, held_out = (scan(tmp_path / f"{folder}{end}").table for end in ("", "-held-out"))
        assert (len(trained), len(held_out)) == (12, 24)
        assert all(name in record.captions[0] for record in [*trained, *held_out])
    files = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("owl*/*.png")]
    assert len(set(files)) == 36  # both names have the same pictures
    before = (tmp_path / "owl/00000.png").stat().st_mtime_ns
    demo_data.main([f"output={tmp_path}"])
    assert (tmp_path / "owl/00000.png").stat().st_mtime_ns == before
