"""data/examine.py: pictures read once, and the index of what was found."""

import os
import subprocess
import sys
import threading

import pytest

from data import examine
from data.examine import in_order, remembered
from data.records import Record, Table
from data.sources import scan
from tests.folders import picture
from tests.runs import ROOT
from train.config import UserError


@pytest.fixture
def reads(monkeypatch):
    """Grows by one with each picture that is decoded."""
    read: list[int] = []
    real = examine.decoded_size
    monkeypatch.setattr(examine, "decoded_size", lambda c: read.append(1) or real(c))
    return read


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        picture(tmp_path / "set" / f"{name}.png")
    return tmp_path / "set"


def test_the_second_scan_reads_only_what_changed(folder, tmp_path, reads):
    index = tmp_path / "cache" / "index.arrow"
    first = scan(folder, index=index)
    written = index.stat().st_ino
    assert len(reads) == 3
    assert list(scan(folder, index=index).table) == list(first.table)
    assert len(reads) == 3 and index.stat().st_ino == written
    os.utime(picture(folder / "b.png", "new", size=(20, 20)), ns=(1, 1))
    again = scan(folder, index=index)
    assert len(reads) == 4 and (again.table[1].width, again.table[1].captions) == (20, ("new",))
    assert [again.table[at] for at in (0, 2)] == [first.table[at] for at in (0, 2)]
    assert {path.name for path in index.parent.iterdir()} == {"index.arrow", "index.arrow.lock"}


def test_pictures_come_and_go(folder, tmp_path, reads):
    index = tmp_path / "index.arrow"
    scan(folder, index=index)
    (folder / "b.png").unlink()
    assert [record.id for record in scan(folder, index=index).table] == ["a.png", "c.png"]
    (folder / "c.png").unlink()
    assert [record.id for record in scan(folder, index=index).table] == ["a.png"]
    for name in ("0", "b", "d"):
        picture(folder / f"{name}.png")
    ids = [record.id for record in scan(folder, index=index).table]
    assert ids == ["0.png", "a.png", "b.png", "d.png"] and len(reads) == 6
    assert list(Table.open(index)) == list(scan(folder).table)


def test_what_was_found_before_an_abort_is_remembered(folder, tmp_path, reads):
    (folder / "b.png").write_bytes(b"hello")
    for _ in range(2):
        with pytest.raises(UserError, match="b.png"):
            scan(folder, index=tmp_path / "index.arrow")
    assert len(reads) == 4  # the bad one twice


@pytest.mark.parametrize("content", [b"", b"{", b"ARROW1\0\0 and no more"])
def test_a_damaged_index_is_made_anew(folder, tmp_path, content):
    index = tmp_path / "index.arrow"
    index.write_bytes(content)
    assert len(scan(folder, index=index).table) == len(Table.open(index)) == 3


def test_an_index_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the index"):
        scan(folder, index=tmp_path / "file" / "index.arrow")


def test_without_locks_it_goes_on(folder, tmp_path, monkeypatch):
    import fcntl

    def refuse(*arguments):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(scan(folder, index=tmp_path / "index.arrow").table) == 3


SCAN = """
import sys
from pathlib import Path
from data import examine
from data.sources import scan
read, real = [], examine.decoded_size
examine.decoded_size = lambda content: read.append(1) or real(content)
table = scan(sys.argv[1], index=Path(sys.argv[2])).table
print(len(read), [record.id for record in table])
"""


def test_of_several_processes_one_reads(folder, tmp_path):
    command = [sys.executable, "-c", SCAN, str(folder), str(tmp_path / "index.arrow")]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    results = [process.communicate(timeout=120)[0].split(maxsplit=1) for process in processes]
    assert sorted(int(read) for read, _ in results) == [0, 0, 3]
    assert {ids.strip() for _, ids in results} == {"['a.png', 'b.png', 'c.png']"}


def test_order_is_kept_and_little_is_under_way():
    begun: set[int] = set()
    lead = 0
    for number in in_order(lambda item: begun.add(item) or item, range(5000)):
        lead = max(lead, len(begun) - number)
    assert begun == set(range(5000)) and number == 4999
    assert lead <= examine.AT_ONCE * (2 * examine.READERS + 2)


def test_a_failure_stops_the_threads():
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // (item - 700), range(5000)))
    assert threading.active_count() == before


def test_rows_are_matched_by_name():
    rows = [Record(name, "", (), 1, 1, "") for name in ("a", "c", "e", "f")]
    matched = remembered(["b", "c", "d", "f", "g"], rows)
    assert [row and row.id for row in matched] == [None, "c", None, "f", None]


def test_files_that_change_places_are_read_again(folder, tmp_path):
    for name, colour in (("a", b"\1"), ("b", b"\2")):
        # After the last chunk, where nothing is looked at.
        (folder / f"{name}.png").write_bytes((folder / "c.png").read_bytes() + colour)
        os.utime(folder / f"{name}.png", ns=(10**18, 10**18))
    first = scan(folder, index=tmp_path / "index.arrow").table
    (folder / "a.png").rename(folder / "t")
    (folder / "b.png").rename(folder / "a.png")
    (folder / "t").rename(folder / "b.png")
    again = scan(folder, index=tmp_path / "index.arrow").table
    assert first[0].sha256 != first[1].sha256
    assert [record.sha256 for record in again][:2] == [first[1].sha256, first[0].sha256]


def test_what_was_only_touched_linked_or_copied_back_is_not_decoded_again(folder, tmp_path, reads):
    index = tmp_path / "index.arrow"
    first = list(scan(folder, index=index).table)
    os.link(folder / "a.png", tmp_path / "link.png")
    os.utime(folder / "b.png")
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes())
    again = list(scan(folder, index=index).table)
    assert len(reads) == 3
    assert [record.sha256 for record in again] == [record.sha256 for record in first]
