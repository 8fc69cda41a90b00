"""One run at a time in a run directory, between real processes."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from tests.runs import ROOT
from train import run_lock
from train.config import UserError

# Takes the lock, says so and waits to be told to go on.
HOLDER = """
import sys
from pathlib import Path
from train.run_lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path):
    process = start(HOLDER, tmp_path / "run")
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_has_it_and_leaves_it_alone(tmp_path, holder):
    before = (tmp_path / "run/.lock").read_bytes()
    with pytest.raises(UserError) as caught, run_lock.locked(tmp_path / "run"):
        raise AssertionError("it was let in")
    said = json.loads(before)
    who = f"process {holder.pid} on {platform.node()}, begun {said['started']}"
    assert who in str(caught.value)
    assert (tmp_path / "run/.lock").read_bytes() == before
    with pytest.raises(UserError), run_lock.locked(tmp_path / "run"):
        raise AssertionError("it was let in the second time")


def test_a_killed_process_leaves_no_lock(tmp_path, holder, capsys):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run/.lock").exists()
    with run_lock.locked(tmp_path / "run"):
        assert f"left by process {holder.pid} on " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]  # which was not made by this one
    assert not list((tmp_path / "run").iterdir())


def test_a_forked_process_does_not_keep_the_lock_of_a_killed_one(tmp_path):
    forks = HOLDER.replace(
        "    print(", "    import os, time\n    os.fork() or time.sleep(60)\n    print("
    )
    process = start(forks.replace('"locked"', '"locked", os.getpid()'), tmp_path / "run")
    try:
        assert process.stdout.readline().split()[1] == str(process.pid)
        process.kill()
        process.wait()
        with run_lock.locked(tmp_path / "run"):
            pass
    finally:
        for path in children(process.pid, tmp_path):
            os.kill(path, signal.SIGKILL)


def children(pid, tmp_path):
    """The processes that have its arguments: its own forks."""
    for path in os.listdir("/proc"):
        try:
            with open(f"/proc/{path}/cmdline", "rb") as file:
                if path.isdecimal() and str(tmp_path).encode() in file.read():
                    yield int(path)
        except OSError:
            continue


def test_nothing_is_left_of_a_lock_and_of_folders_made_for_it(tmp_path):
    with run_lock.locked(tmp_path / "a/b"):
        assert (tmp_path / "a/b/.lock").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), run_lock.locked(tmp_path / "a/b"):
        (tmp_path / "a/mine").write_text("")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine"]


CROWD = """
import sys, time
from pathlib import Path
from train.config import UserError
from train.run_lock import locked
folder, counter, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
while times:
    try:
        with locked(folder):
            count = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(count + 1))
            times -= 1
    except UserError as error:
        assert "in use" in str(error), error
"""


def test_of_many_that_come_and_go_never_two_have_it(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    crowd = [start(CROWD, tmp_path / "deep/run", counter, 60) for _ in range(4)]
    assert [process.wait(timeout=60) for process in crowd] == [0] * 4
    assert int(counter.read_text()) == 240
    assert not (tmp_path / "deep/run/.lock").exists()


def signed(folder, **changes):
    """The lock's file as a process that has ended left it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    said = {"host": platform.node(), "pid": gone.pid, "started": "then", "ticks": 1}
    folder.mkdir()
    (folder / ".lock").write_text(json.dumps(said | changes))


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.parametrize(
    "changes",
    [{}, {"pid": os.getpid()}, {"pid": 2**40}],
    ids=["a process that is gone", "a number that is another's by now", "no number of a process"],
)
def test_without_locks_what_a_dead_process_of_this_machine_left_is_taken_over(
    tmp_path, no_locks, capsys, changes
):
    signed(tmp_path / "run", **changes)
    with run_lock.locked(tmp_path / "run"):
        assert "took over" in capsys.readouterr().out
        assert json.loads((tmp_path / "run/.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run/.lock").exists()


def test_without_locks_a_new_directory_is_free(tmp_path, no_locks):
    with run_lock.locked(tmp_path / "run"), pytest.raises(UserError, match="in use by another run"):
        with run_lock.locked(tmp_path / "run"):
            raise AssertionError("it was let in")


@pytest.mark.parametrize("content", ['{"host": "elsewhere"}', "[" * 4000, "not JSON", "elsewhere"])
def test_without_locks_what_cannot_be_judged_is_the_users_to_remove(tmp_path, no_locks, content):
    signed(tmp_path / "run", host="elsewhere")
    if content != "elsewhere":
        (tmp_path / "run/.lock").write_text(content)
    before = (tmp_path / "run/.lock").read_bytes()
    with pytest.raises(UserError, match=rf"remove {tmp_path}/run/\.lock"):
        with run_lock.locked(tmp_path / "run"):
            raise AssertionError("it was let in")
    assert (tmp_path / "run/.lock").read_bytes() == before


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be written"), run_lock.locked(tmp_path / "run"):
        raise AssertionError("it was let in")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_refused():
    with pytest.raises(UserError, match="output=/proc/run cannot be written"):
        with run_lock.locked(run_lock.Path("/proc/run")):
            raise AssertionError("it was let in")
