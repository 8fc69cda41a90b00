"""data/streaming.py: a dataset that passes once, shard by shard, on any number of processes."""

import io
import zipfile
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest

from data.streaming import collect, done_units, open_stream, stream_records
from tests.hf_sets import dataset, loaded_before, parquet, picture
from train.config import RunFailed, UserError

SIZES = (3, 1, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    return str(parquet(tmp_path / "pq", *SIZES))


def exhaust(pictures):
    for _ in pictures:
        pass


def streamed(path, folder, world=1, visit=exhaust, on_bad="abort", **options):
    stream = open_stream(str(path), **options)
    for rank in range(world):
        stream_records(stream, folder, visit, on_bad=on_bad, rank=rank, world=world)
    return collect(stream, folder, on_bad=on_bad)


def test_opening_reads_no_picture_and_says_what_there_is(folder):
    stream = open_stream(folder)
    assert stream.units == len(SIZES)
    assert "4 shards" in stream.recognised and "column image" in stream.recognised
    assert stream.idle(4) == [] and "2 of 6 processes" in stream.idle(6)[0]
    assert stream.fingerprint == open_stream(folder).fingerprint
    assert stream.fingerprint != open_stream(folder, caption="other").fingerprint


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_any_number_of_processes_collect_the_same_table(folder, tmp_path, world):
    seen = {}

    def visit(pictures):
        seen.update({record.id: content for record, content in pictures})

    found = streamed(folder, tmp_path / "out", world, visit)
    widths = list(range(40, 40 + sum(SIZES)))
    assert [record.width for record in found.table] == widths
    assert [record.captions[0] for record in found.table] == [f"picture {w}" for w in widths]
    assert [seen[record.id] for record in found.table] == [picture(w) for w in widths]
    assert {record.location for record in found.table} == {"stream:"}
    assert list(found.table) == list(streamed(folder, tmp_path / "again").table)


def test_a_streamed_picture_is_not_kept(folder, tmp_path):
    record = streamed(folder, tmp_path / "out").table[0]
    with pytest.raises(UserError, match="streamed"):
        record.read()


def test_what_is_finished_is_not_streamed_again(folder, tmp_path):
    stream, out, visited = open_stream(folder), tmp_path / "out", []

    def dies_in_the_third(pictures):
        visited.append([record.width for record, _ in pictures])
        if len(visited) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_records(stream, out, dies_in_the_third)
    assert done_units(stream, out) == {0, 1}
    with pytest.raises(RunFailed, match=r"\[2, 3\]"):
        collect(stream, out)
    stream_records(stream, out, dies_in_the_third)
    assert visited == [[40, 41, 42], [43], [44, 45, 46, 47], [44, 45, 46, 47], [48, 49]]
    assert len(collect(stream, out).table) == sum(SIZES)
    stream_records(stream, out, dies_in_the_third)
    assert len(visited) == 5


def test_another_stream_in_the_same_folder_starts_anew(folder, tmp_path):
    streamed(folder, tmp_path / "out")
    parquet(tmp_path / "pq", *SIZES, first=60)
    assert done_units(open_stream(folder), tmp_path / "out") == set()
    assert streamed(folder, tmp_path / "out").table[0].width == 60


def test_bad_rows_are_named_or_stop_the_run(tmp_path):
    contents = [picture(), b"no picture", picture(50)]
    rows = dataset(image=[{"bytes": c, "path": None} for c in contents])
    (tmp_path / "pq").mkdir()
    rows.to_parquet(tmp_path / "pq" / "train.parquet")
    found = streamed(tmp_path / "pq", tmp_path / "out", on_bad="report")
    assert [record.width for record in found.table] == [40, 50]
    assert [bad.id for bad in found.rejected] == ["shard 00000 row 0000001"]
    assert any("left out (1)" in note for note in found.notes)
    with pytest.raises(UserError, match="shard 00000 row 0000001.*not a picture"):
        collect(open_stream(str(tmp_path / "pq")), tmp_path / "out")
    with pytest.raises(UserError, match="data.on_bad_image=report"):
        streamed(tmp_path / "pq", tmp_path / "fresh")


def test_a_shard_that_breaks_off_fails_the_run_and_keeps_the_rest(folder, tmp_path):
    stream, out = open_stream(folder), tmp_path / "out"
    broken = tmp_path / "pq" / "data" / "train-00002-of-00004.parquet"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(RunFailed, match="shard 2 .* run the command again"):
        stream_records(stream, out, exhaust)
    assert done_units(stream, out) == {0, 1}


def test_no_more_than_a_few_pictures_are_held(tmp_path, monkeypatch):
    from data import streaming

    alive = []
    monkeypatch.setattr(streaming, "READERS", 2)
    monkeypatch.setattr(streaming, "measured", lambda content: alive.append(1) or ("", 1, 1))
    stream = open_stream(str(parquet(tmp_path / "big", 60)))
    pictures = streaming.stream_unit(stream, 0, on_bad="abort", rejected=[])
    for seen in range(1, 20):
        next(pictures)
        assert len(alive) <= seen + 5
    pictures.close()


def test_files_and_archives_of_the_folder_are_read_and_no_others(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    (plain / "one.jpg").write_bytes(picture(50))
    (tmp_path / "outside.jpg").write_bytes(picture(60))
    (plain / "two.jpg").symlink_to(tmp_path / "outside.jpg")
    with zipfile.ZipFile(packed / "all.zip", "w") as archive:
        archive.writestr("three.jpg", picture(70))
    with pytest.raises(UserError, match="two.jpg.*outside"):
        open_stream(str(plain), caption="a thing")
    (plain / "two.jpg").unlink()
    for folder, width in ((plain, 50), (packed, 70)):
        found = streamed(folder, tmp_path / f"out-{width}", caption="a thing")
        assert [record.width for record in found.table] == [width]


def test_files_on_the_hub_are_read_from_the_same_dataset_only(monkeypatch):
    import fsspec

    from data.streaming import _content

    opened = []
    monkeypatch.setattr(fsspec, "open", lambda url, mode: opened.append(url) or io.BytesIO(b"x"))
    good = "hf://datasets/someone/set@abc/1.jpg"
    archived = "zip://1.jpg::hf://datasets/someone/set@abc/all.zip"
    bad = ["hf://datasets/someone/other@abc/1.jpg", "https://example.org/1.jpg", "/etc/hostname"]
    bad += [f"zip://1.jpg::{name}" for name in bad] + [f"https://example.org::{good}", f"x{good}"]
    for path in (good, archived):
        assert _content({"path": path, "bytes": None}, "hf:someone/set:part", []) == b"x"
    for path in bad:
        with pytest.raises(ValueError):
            _content({"path": path, "bytes": None}, "hf:someone/set", [Path("/nowhere")])
    assert opened == [good, archived]


def test_a_network_that_fails_is_not_taken_for_a_bad_row(monkeypatch):
    import fsspec

    from data.streaming import _content

    for error, kind in ((TimeoutError("slow"), RunFailed), (FileNotFoundError(), OSError)):
        monkeypatch.setattr(fsspec, "open", Mock(side_effect=error))
        with pytest.raises(kind):
            _content({"path": "hf://datasets/someone/set@abc/1.jpg"}, "hf:someone/set", [])


def test_a_dataset_on_the_hub_is_streamed_by_its_name(tmp_path):
    path = loaded_before(tmp_path / "cache", parquet(tmp_path / "pq", 2), "someone", "pictures")
    assert [record.width for record in streamed(path, tmp_path / "out").table] == [40, 41]


def test_what_cannot_be_streamed_is_said(folder, tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="leave out data.streaming"):
        open_stream(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="data.split=test.*train"):
        open_stream(folder, split="test")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        open_stream("hf:someone/unknown")
    with pytest.raises(UserError, match="data.path"):
        open_stream(str(tmp_path / "nowhere"))
