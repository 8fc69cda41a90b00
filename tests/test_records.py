"""data/records.py: rows come back as they were, from memory or from a file that is whole."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from data.records import FILE, ROWS_AT_ONCE, Joined, Record, Table
from tests.runs import ROOT
from train.config import UserError

FULL = Record(
    id="sub/ä\n.png",
    location="file:/somewhere/ä\n.png",
    captions=("one", "two, {a|b}"),
    width=640,
    height=480,
    sha256="ab" * 32,
    focus=(0.25, 1.0),
    mask="/somewhere/ä.mask.png",
    mask_sha256="cd" * 32,
    depth="/somewhere/ä.depth.png",
    depth_sha256="ef" * 32,
    file_bytes=2**40,
    modified=2**60,
)


def plain(number: int) -> Record:
    return Record(f"{number:06d}.jpg", f"file:/x/{number}", (f"no {number}",), 1 + number, 9, "00")


def test_every_field_survives_a_file(tmp_path):
    assert {field.name for field in dataclasses.fields(Record)} == set(Record.__slots__)
    records = [FULL, plain(0)]
    table = Table.write(tmp_path / "deep" / "t.arrow", records, {"recognised": "ü"})
    again = Table.open(tmp_path / "deep" / "t.arrow")
    assert list(table) == list(again) == list(Table.of(records)) == records
    assert again.about == {"recognised": "ü"} and again[0] == again[-2] == FULL
    assert again.widths.tolist() == [640, 1] and again.heights.dtype == np.int32
    assert not list((tmp_path / "deep").glob(".*"))


def test_rows_by_number_by_slice_and_by_choice():
    count = 2 * ROWS_AT_ONCE + 3
    table = Table.of(plain(number) for number in range(count))
    for at in (0, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, count - 1):
        assert table[at] == plain(at)
    assert list(table[5:8]) == [plain(5), plain(6), plain(7)]
    assert [record.width for record in table.take([9, 2])] == [10, 3]
    assert table.column("id")[-1] == plain(count - 1).id
    for wrong in (count, -count - 1):
        with pytest.raises(IndexError):
            table[wrong]


def test_an_empty_table_is_a_table(tmp_path):
    table = Table.write(tmp_path / "t.arrow", [])
    assert len(table) == 0 and list(table) == [] and table.widths.shape == (0,)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "t.arrow"
    Table.write(file, [plain(1)])

    def failing():
        yield plain(2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Table.write(file, failing())
    assert list(Table.open(file)) == [plain(1)]
    assert [path.name for path in tmp_path.iterdir()] == ["t.arrow"]


@pytest.mark.parametrize("damage", [b"", b"ARROW1", "half", "version"])
def test_what_is_no_table_of_ours_is_refused(tmp_path, damage, monkeypatch):
    file = tmp_path / "t.arrow"
    if damage == "version":
        monkeypatch.setattr("data.records.VERSION", -1)
    Table.write(file, [plain(number) for number in range(100)])
    monkeypatch.undo()
    if damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage != "version":
        file.write_bytes(damage)
    with pytest.raises((OSError, ValueError)):
        Table.open(file)


def test_several_tables_are_one_with_the_names_of_their_sources():
    joined = Joined({"a": Table.of([plain(0), plain(1)]), "b": Table.of([plain(0)])})
    assert [record.id for record in joined] == ["a/000000.jpg", "a/000001.jpg", "b/000000.jpg"]
    assert joined[2] == joined[-1] == list(joined)[2] and joined[1:] == list(joined)[1:]
    assert joined.sources.tolist() == [0, 0, 1] and joined.widths.tolist() == [1, 2, 1]
    alone = Joined({"a": Table.of([plain(0)])})
    assert alone[0] == plain(0)


def test_reading_what_is_gone_names_it(tmp_path):
    gone = dataclasses.replace(FULL, location=f"{FILE}{tmp_path / 'gone.png'}")
    with pytest.raises(UserError, match=r"gone\.png"):
        gone.read()
    with pytest.raises(UserError, match="streamed and not kept"):
        dataclasses.replace(FULL, location="stream:").read()


def test_a_large_table_is_not_read_into_memory(tmp_path):
    words = "w" * 2000
    Table.write(
        tmp_path / "t", (dataclasses.replace(plain(k), captions=(words,)) for k in range(20_000))
    )
    script = f"""
from pathlib import Path
from data.records import Table
def used():  # without pages of mapped files, which the system takes back
    status = Path("/proc/self/status").read_text().partition("RssAnon:")[2]
    return int(status.split()[0]) >> 10
Table.of([])
before = used()
table = Table.open(Path({str(tmp_path / "t")!r}))
assert table[19_999].width == 20_000 and len(table.widths) == 20_000
print(used() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) < 20, done  # MiB, of a file of 40
