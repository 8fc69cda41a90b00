"""data/store.py, shards.py and upkeep.py: whole entries or none, never wrong data, nothing lost."""

import json
import multiprocessing
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import files, shards, store
from data.files import write_atomically
from data.shards import Broken
from data.store import TensorStore, locked
from data.upkeep import DAY
from train.config import UserError

FORK = multiprocessing.get_context("fork")


def key(number: int) -> str:
    return f"{number:040x}"


def value(number: int) -> torch.Tensor:
    return torch.full((10,), float(number))


def fill(store: TensorStore, numbers, name: str = "a") -> None:
    with store.writer() as writer:
        for number in numbers:
            writer.put(key(number), {name: value(number)})


def held(store: TensorStore, numbers) -> list[int]:
    """Which of these are there and read rightly; anything else that comes back is a failure."""
    found = []
    for number in numbers:
        tensors = store.get(key(number))
        if tensors is not None:
            assert all(torch.equal(tensor, value(number)) for tensor in tensors.values())
            found.append(number)
    return found


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_entries_come_back_as_they_were(folder):
    from safetensors.torch import load_file

    tensors = {
        "half": torch.randn(2, 3).half(),
        "whole": torch.arange(4),
        "brain": torch.randn(1).bfloat16(),
        "truth": torch.tensor([True, False]),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    here = TensorStore(folder)
    assert here.get(key(1)) is None and here.names(key(1)) == frozenset()
    with here.writer() as writer:
        writer.put(key(1), tensors)
        tensors["half"], put = tensors["half"].clone(), tensors["half"]
        put.zero_()  # what was put is what is written
    for reader in (here, TensorStore(folder), pickle.loads(pickle.dumps(here))):
        assert reader.names(key(1)) == tensors.keys()
        assert reader.shape(key(1), "half") == (2, 3) and reader.shape(key(1), "x") is None
        back = reader.get(key(1))
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
        assert reader.get(key(1), ["one", "x"]).keys() == {"one"}
        back["whole"] += 1  # its own memory
        assert torch.equal(reader.get(key(1))["whole"], tensors["whole"])
    (file,) = shard_files(folder)
    assert torch.equal(load_file(file)[f"{key(1)}/turned"], tensors["turned"])


def test_an_entry_may_grow_and_stand_twice(folder):
    here, there = TensorStore(folder), TensorStore(folder)
    fill(here, [1, 2])
    assert there.names(key(1)) == {"a"}
    fill(here, [1], "b")
    fill(here, [1, 2])
    assert here.names(key(1)) == {"a", "b"} and here.get(key(1)).keys() == {"a", "b"}
    assert there.names(key(1)) == {"a"}
    assert there.refresh() and there.names(key(1)) == {"a", "b"}
    assert not there.refresh()


def test_shards_are_closed_by_entries_bytes_and_time(folder, monkeypatch):
    monkeypatch.setattr(store, "ENTRIES", 4)
    fill(TensorStore(folder), range(10))
    assert sorted(len(shards.parts(file)) for file in shard_files(folder)) == [2, 4, 4]
    monkeypatch.setattr(store, "BYTES", 80)
    fill(TensorStore(folder / "bytes"), range(4))
    assert len(shard_files(folder / "bytes")) == 2
    monkeypatch.setattr(store, "SECONDS", 0.0)
    fill(TensorStore(folder / "time"), range(3))
    assert len(shard_files(folder / "time")) == 3


def test_what_was_put_before_an_error_stays(folder):
    here = TensorStore(folder)
    with pytest.raises(KeyboardInterrupt), here.writer() as writer:
        writer.put(key(1), {"a": value(1)})
        raise KeyboardInterrupt
    assert held(here, [1]) == [1]


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[-9] ^= 1
    elif how == "header":
        content[:8] = b"\xff" * 8
    elif how == "muddled":  # one key's digits in place of another's, in the header
        content = content.replace(key(1).encode(), key(7).encode())
    others = {"cut": content[:-5], "empty": b"", "text": b"not safetensors", "no json": b"\2" * 99}
    file.write_bytes(others.get(how, content))


DAMAGES = ["cut", "flip", "header", "empty", "text", "no json", "muddled"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_missing_from_then_on(folder, how):
    fill(TensorStore(folder), [0, 1])
    (file,) = shard_files(folder)
    warm = TensorStore(folder)
    warm.names(key(1))
    damage(file, how)
    if how not in {"header", "muddled"}:  # which is read once
        for _ in range(2):
            assert warm.get(key(1)) is None and warm.names(key(1)) == frozenset()
    later = TensorStore(folder)
    assert held(later, [1, 7]) == []
    assert TensorStore(folder).names(key(1)) == TensorStore(folder).names(key(7)) == frozenset()
    assert held(later, [0]) == ([0] if how in {"flip", "muddled"} else [])
    fill(later, [0, 1])
    assert held(later, [0, 1]) == held(TensorStore(folder), [0, 1]) == [0, 1]


def test_a_sound_copy_stands_for_a_damaged_one(folder):
    here = TensorStore(folder)
    for _ in range(2):
        fill(here, [1])
    damage(shard_files(folder)[0], "flip")
    assert held(here, [1]) == [1]


def test_half_an_entry_is_not_taken_for_a_whole_one(folder):
    here = TensorStore(folder)
    fill(here, [1], "b")
    (other,) = shard_files(folder)
    fill(here, [1], "a")
    damage(next(file for file in shard_files(folder) if file != other), "flip")
    for reader in (here, TensorStore(folder)):
        assert reader.get(key(1)) is None and reader.names(key(1)) == frozenset()


def header(name: str = "k/a", sum: str = "0", dtype: str = "F32", shape=(1,), at=(0, 4)) -> bytes:
    said = {"dtype": dtype, "shape": shape, "data_offsets": at}
    return json.dumps({"__metadata__": {"k/a": sum, name: sum}, name: said}).encode()


HEADERS = [
    b"[]",
    b"{}",
    b'{"__metadata__": []}',
    b"[" * 100_000,
    header(at=(0, 9)),
    header(at=(-4, 4), shape=(2,)),
    header(at=(0, 4, 8)),
    header(at=(0.0, 4.0)),
    header(shape=(-1, -1)),
    header(shape=(1,) * 99),
    header(shape=4),
    header(dtype="F9"),
    header(dtype=[]),
    header(sum="f" * 17),
    header(sum="-1"),
    header(name="k"),
    header(name="/a"),
    header(name="\ud800/a"),
    header().replace(b"k/a", b"j/a", 1),
]


def test_the_header_that_the_next_ones_spoil_is_a_good_one(folder):
    assert shards.parts(written(folder, header()))


def written(folder: Path, header: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "hostile.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return file


@pytest.mark.parametrize("header", HEADERS)
def test_a_hostile_header_is_refused(folder, header):
    fill(TensorStore(folder), [1])
    file = written(folder / "shards", header)
    with pytest.raises(Broken):
        shards.parts(file)
    here = TensorStore(folder)
    assert held(here, [1]) == [1]
    assert [found.shard for found in here.verify()] == [file]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_a_shard_that_crashes(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("shard") / "x.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    try:
        shards.parts(file)
    except Broken:
        pass


@pytest.mark.parametrize("how", DAMAGES)
def test_verify_names_the_damage_and_repairs_it(folder, how):
    here = TensorStore(folder)
    fill(here, [0, 1])
    damage(shard_files(folder)[0], how)
    fill(here, [2])
    found = here.verify()
    assert len(found) == 1 and found == here.verify(repair=True)
    assert "shards/" in str(found[0])
    if how == "flip":
        assert key(1) in str(found[0])
    assert here.verify() == []
    left = [0, 2] if how in {"flip", "muddled"} else [2]
    assert held(here, range(8)) == held(TensorStore(folder), range(8)) == left


def test_what_a_run_found_damaged_is_named_too(folder):
    fill(TensorStore(folder), [0, 1])
    (file,) = shard_files(folder)
    sound = file.read_bytes()
    damage(file, "flip")
    assert TensorStore(folder).get(key(1)) is None
    file.write_bytes(sound)
    here = TensorStore(folder)
    assert "a run found it damaged" in str(*here.verify(repair=True))
    assert here.verify() == [] and held(here, [0, 1]) == [0]
    assert not shards.listing(folder / "shards", shards.DAMAGED)


def test_prune_keeps_what_is_to_be_kept_and_merges(folder):
    here, reader = TensorStore(folder), TensorStore(folder)
    for start in range(0, 40, 5):
        fill(here, range(start, start + 5))
    fill(here, range(10))  # twice there
    assert reader.names(key(1))
    before = sum(file.stat().st_size for file in shard_files(folder))
    done = here.prune(keep=(key(number) for number in range(0, 40, 2)))
    assert (done.kept, done.removed) == (20, 20)
    (file,) = shard_files(folder)
    assert done.freed == before - file.stat().st_size
    assert held(here, range(40)) == held(TensorStore(folder), range(40)) == [*range(0, 40, 2)]
    assert held(reader, range(40)) == [*range(0, 40, 2)]  # it finds them where they are now
    assert here.prune().freed == 0 and shard_files(folder) == [file]
    assert here.prune(keep=[]).kept == 0 and shard_files(folder) == []


def test_prune_by_last_use(folder):
    here = TensorStore(folder)
    fill(here, [1])
    (old,) = shard_files(folder)
    fill(here, [2])
    for file in shard_files(folder):
        os.utime(file, (time.time() - 40 * DAY,) * 2)
    assert TensorStore(folder).names(key(2)) == {"a"}  # a run has asked for it
    assert here.prune(unused_days=30).removed == 1
    assert held(here, [1, 2]) == [2] and not old.exists()


def test_merging_does_not_make_a_shard_seem_used(folder):
    here = TensorStore(folder)
    for number in (1, 2):
        fill(here, [number])
    for file in shard_files(folder):
        os.utime(file, (time.time() - 20 * DAY,) * 2)
    assert here.prune().kept == 2 and len(shard_files(folder)) == 1
    assert here.prune(unused_days=10).kept == 0


@pytest.mark.parametrize("stop", range(6))
def test_a_prune_killed_at_any_point_loses_nothing(folder, monkeypatch, stop):
    monkeypatch.setattr("data.upkeep.ENTRIES", 4)
    here = TensorStore(folder)
    for start in range(0, 12, 3):
        fill(here, range(start, start + 3))
    left = iter(range(stop))

    def once(original):
        def step(*arguments, **named):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        return step

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", once(Path.unlink))
        patched.setattr(shards, "write", once(shards.write))
        with pytest.raises(KeyboardInterrupt):
            here.prune(keep=[key(number) for number in range(0, 12, 2)])
    assert held(TensorStore(folder), range(0, 12, 2)) == [*range(0, 12, 2)]
    assert here.prune(keep=[key(number) for number in range(0, 12, 2)]).kept == 6
    assert held(TensorStore(folder), range(12)) == [*range(0, 12, 2)]


def test_a_prune_waits_for_no_writer_and_a_writer_for_a_prune(folder, monkeypatch):
    here = TensorStore(folder)
    with here.writer() as writer, here.writer():
        writer.put(key(1), {"a": value(1)})
        with pytest.raises(UserError, match="another process is writing"):
            here.prune(keep=[])
        with pytest.raises(UserError, match="another process is writing"):
            here.verify(repair=True)
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.0)
    with locked(folder, exclusive=True), pytest.raises(UserError, match="being pruned"):
        fill(here, [2])
    assert held(here, [1, 2]) == [1]


def test_what_killed_writers_left_is_cleaned_when_it_is_old(folder):
    here = TensorStore(folder)
    fill(here, [1])
    old, live = (folder / "shards" / f".{name}.safetensors.9.tmp" for name in ("old", "live"))
    for file in (old, live):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * shards.LEFTOVER_SECONDS,) * 2)
    fill(here, [2])
    assert live.exists() and not old.exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(UserError, match="No space"):
        fill(TensorStore(tmp_path / "cache"), [1])
    assert shard_files(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the cache in .*file"):
        fill(TensorStore(tmp_path / "file"), [1])


def _write(folder: Path, first: int) -> None:
    for start in range(first, first + 40, 10):
        fill(TensorStore(folder), range(start, start + 10))


def test_several_processes_write_and_read_at_once(folder):
    (folder / "shards").mkdir(parents=True)
    writers = [FORK.Process(target=_write, args=(folder, first)) for first in (0, 20, 40)]
    for process in writers:
        process.start()
    here = TensorStore(folder)
    while any(process.is_alive() for process in writers):
        here.refresh()
        held(here, range(80))
    assert [process.exitcode for process in writers] == [0, 0, 0]
    here.refresh()
    assert held(here, range(80)) == [*range(80)]


def _build(folder: Path, count: int, done) -> None:
    store.ENTRIES = 8
    with TensorStore(folder).writer() as writer:
        for number in range(count):
            writer.put(key(number), {"a": value(number)})
            done.value = number + 1


def test_a_killed_build_loses_at_most_one_shard(folder):
    for attempt in range(6):
        done = FORK.Value("i", 0)
        build = FORK.Process(target=_build, args=(folder / str(attempt), 1_000_000, done))
        build.start()
        while done.value < 50:
            time.sleep(0.001)
        time.sleep(random.Random(attempt).random() / 50)
        build.kill()
        build.join()
        here = TensorStore(folder / str(attempt))
        found = held(here, range(done.value + 1))
        assert found == [*range(len(found))] and len(found) > done.value - 8
        assert here.verify() == []


def _read(folder, here, results) -> None:
    results.put(held(here, range(20)))


def test_forked_workers_read_what_the_parent_has_open(folder):
    here = TensorStore(folder)
    fill(here, range(20))
    held(here, range(20))
    results = FORK.Queue()
    workers = [FORK.Process(target=_read, args=(folder, here, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [[*range(20)]] * 2
    for worker in workers:
        worker.join()


def test_open_files_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(store, "MAPS", 3)
    monkeypatch.setattr(store, "ENTRIES", 1)
    here = TensorStore(folder)
    fill(here, range(20))
    before = len(os.listdir("/proc/self/fd"))
    assert held(here, range(20)) == [*range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3
