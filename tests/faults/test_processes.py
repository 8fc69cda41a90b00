"""What the tests of faults stand on: processes that are what they are said to be, and faults that
strike where they are told to."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.injected import ROOT, Fault, record, recorded
from tests.faults.processes import Starter

SCRIPT = """
import json, os, resource, signal, sys
from train import parsing
print(json.dumps({
    "arguments": sys.argv[1:],
    "folder": sys.path[0],
    "world": [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "GIVEN")],
    "limit": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
    "asked": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "alone": len(os.listdir("/proc/self/task")),
}))
for text in ("a: 1", "b: 2", "c: 3"):
    print(parsing.yaml.safe_load(text))
    if "fork" in sys.argv and os.fork() == 0:
        signal.pause()
sys.exit(len(sys.argv))
"""
LOAD = "yaml:safe_load"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path / "script.py"


def test_a_process_has_its_own_arguments_limits_environment_and_end(
    starter: Starter, script: Path
) -> None:
    limits = {resource.RLIMIT_FSIZE: (12345, 12345)}
    said = starter.finish(script, "one", code=2, limits=limits, env={"GIVEN": "yes"})
    assert said.count("\n") == 4
    assert '"arguments": ["one"]' in said and f'"folder": "{script.parent}"' in said
    assert '"world": [null, null, "yes"], "limit": 12345, "asked": true, "alone": 1' in said


def test_several_have_ranks_and_faults_of_their_own(starter: Starter, script: Path) -> None:
    faults = [
        Fault(at=LOAD, do="kill", call=2, rank=0),
        Fault(at=LOAD, do="raise:OSError:28", call=3, rank=1),
        Fault(at=LOAD, do="exit:9", call=1, after=True, rank=2),
    ]
    run = starter.start(script, processes=3, faults=faults)
    assert run.wait() == [-signal.SIGKILL, 1, 9]
    assert run.output.count("{'a': 1}") == 2  # the third process ended before it said so
    assert run.output.count("{'b': 2}") == 1
    assert "OSError: [Errno 28] No space left on device" in run.output
    assert run.alive() == []


def test_calls_are_recorded(starter: Starter, script: Path, tmp_path: Path) -> None:
    starter.finish(script, code=1, faults=[record(tmp_path / "calls", LOAD, after=True)])
    lines = recorded(tmp_path / "calls")
    assert [(line["call"], line["given"], line["gives"]) for line in lines] == [
        (1, ["a: 1"], {"a": 1}),
        (2, ["b: 2"], {"b": 2}),
        (3, ["c: 3"], {"c": 3}),
    ]


def test_what_a_run_leaves_behind_is_seen_and_killed(starter: Starter, script: Path) -> None:
    run = starter.start(script, "fork", faults=[Fault(at=LOAD, do="hang", call=3)])
    run.until(lambda: "{'b': 2}" in run.output)
    run.until(lambda: len(run.alive()) == 3)
    run.signal(signal.SIGTERM)
    assert run.wait() == [-signal.SIGTERM]
    assert len(run.alive()) == 2
    run.kill()
    assert run.alive() == []


def test_a_run_that_does_not_end_fails_with_what_it_said(starter: Starter, script: Path) -> None:
    run = starter.start(script, faults=[Fault(at=LOAD, do="hang", call=2)])
    with pytest.raises(AssertionError, match=r"not ended after 1 s(.|\n)*{'a': 1}"):
        run.wait(timeout=1)
    assert run.alive() == []


@pytest.mark.slow
def test_all_ends_where_the_tests_are_killed(script: Path) -> None:
    """As it does where pytest is: what forks runs notices, and so do the runs."""
    program = f"""
import os, signal
from pathlib import Path
from tests.faults.processes import Fault, Starter
starter = Starter()
run = starter.start(Path({str(script)!r}), "fork", faults=[Fault(at="yaml:safe_load", do="hang")])
print(starter.warm().pid, *run.pids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in killed.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(lives, pids))


def lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
