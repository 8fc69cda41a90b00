import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from train import dashboards, screens
from train.config import RunFailed, TrackingConfig
from train.tracking import MetricsFile, Trackers, introduction, open_trackers, read_metrics

ROOT = Path(__file__).resolve().parent.parent

# Stands in for wandb in the dashboard's process: notes each call, and then fails as told.
FAKE = """
import json, os, time

if "import" in os.environ["FAILS"]:
    raise ImportError("No module named 'wandb'")

def do(what, **details):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([what, details]) + "\\n")
    print("a wall of text")
    if f"{what}:raise" in os.environ["FAILS"]:
        raise ConnectionError("no network\\nand a page about it")
    if f"{what}:hang" in os.environ["FAILS"]:
        time.sleep(600)
    if f"{what}:crash" in os.environ["FAILS"]:
        os._exit(66)

def Settings(**settings):
    return settings

class Run:
    url, offline = "https://dashboard", False

    def __init__(self, folder):
        self.dir = folder + "/wandb/run-1/files"

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, line):
        do("log", **line)

    def log_artifact(self, artifact):
        do("artifact", name=artifact.name)

    def finish(self, exit_code):
        do("finish", code=exit_code)

class Artifact:
    def __init__(self, name, type):
        self.name = name

    def add_dir(self, path, **options):
        pass

    add_file = add_dir

def teardown():
    do("teardown")

def init(*, mode="online", **details):
    do("init" if mode == "online" else mode, **details)
    run = Run(details["dir"])
    run.offline = mode == "offline"
    return run
"""


def start(output, *, at=0, main=True, trackers=()):
    config = TrackingConfig(trackers=list(trackers), project="p")
    return open_trackers(output, {"seed": 0}, config, start=at, main=main)


def steps(output):
    return [line["step"] for line in read_metrics(output / "metrics.jsonl")]


# metrics.jsonl


def test_lines_are_on_disk_at_once(tmp_path):
    trackers = start(tmp_path)
    trackers.log({"step": 1, "loss": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    trackers.finish()


def test_resuming_drops_what_will_be_written_again_and_the_torn_line(tmp_path):
    trackers = start(tmp_path)
    for step in (1, 2, 3, 4):
        trackers.log({"step": step})
    trackers.finish()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n\0\0\xff\n{"step": 5, "lo')
    assert steps(tmp_path) == [1, 2, 3, 4]
    resumed = start(tmp_path, at=2)
    resumed.log({"step": 3})
    resumed.finish()
    assert steps(tmp_path) == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kill_while_rewriting_loses_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "metrics.writing").write_text('{"st')
    MetricsFile(tmp_path / "metrics.jsonl", start=5).finish()
    assert steps(tmp_path) == [1]


@contextmanager
def room(size):
    """No file can grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_for_a_full_disk_and_none_is_torn(tmp_path, capsys):
    trackers, file = start(tmp_path), tmp_path / "metrics.jsonl"
    trackers.log({"step": 1})
    with room(20):
        for step in (2, 3):
            trackers.log({"step": step})
        assert file.read_text() == '{"step": 1}\n'
    trackers.log({"step": 4})
    trackers.finish()
    assert steps(tmp_path) == [1, 2, 3, 4]
    warnings = capsys.readouterr().err
    assert warnings.count("warning:") == 1 and str(file) in warnings


def test_what_a_full_disk_never_took_is_counted(tmp_path, capsys):
    with room(20):
        trackers = start(tmp_path)
        for step in (1, 2, 3):
            trackers.log({"step": step})
        trackers.finish()
    assert steps(tmp_path) == [1]
    assert "2 lines of" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_to_begin_with_ends_the_run(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunFailed, match="metrics.jsonl cannot be written"):
        start(tmp_path)


def test_only_the_main_process_writes(tmp_path):
    trackers = start(tmp_path, main=False, trackers=["wandb"])
    trackers.log({"step": 1})
    trackers.finish()
    assert not list(tmp_path.iterdir())


# Dashboards


class Fake:
    def __init__(self, calls):
        self._calls = calls

    @property
    def calls(self):
        """What was called, with its details."""
        text = self._calls.read_text() if self._calls.exists() else ""
        return [tuple(json.loads(line)) for line in text.splitlines()]

    def until(self, what):
        deadline = time.monotonic() + 30
        while what not in [call[0] for call in self.calls]:
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.01)


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    """Puts the fake in wandb's place, failing as given: {"init:hang"}."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CALLS", str(folder / "calls"))

    def install(*fails):
        monkeypatch.setenv("FAILS", " ".join(fails))
        return Fake(folder / "calls")

    return install


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(dashboards, "FINISH_SECONDS", 0.5)
    monkeypatch.setattr(dashboards, "_GRACE_SECONDS", 0.5)


def process_of(trackers):
    return trackers._trackers[1]._process


def run_to_the_end(output, *, lines=2):
    trackers = start(output, trackers=["wandb"])
    process = process_of(trackers)
    for step in range(1, lines + 1):
        trackers.log({"step": step, "grad_norm": None})
    trackers.finish()
    assert steps(output) == list(range(1, lines + 1))
    assert process.wait(10) is not None
    return process


def test_a_dashboard_is_told_all_without_its_walls_of_text(tmp_path, wandb, capfd):
    fake = wandb()
    run_to_the_end(tmp_path)
    assert [call for call in fake.calls if call[0] != "init"] == [
        ("log", {"step": 1}),
        ("log", {"step": 2}),
        ("finish", {"code": 0}),
    ]
    assert capfd.readouterr() == ("wandb: https://dashboard\n", "")


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_failing_dashboard_costs_a_warning_and_nothing_else(tmp_path, wandb, failing, capsys):
    fake = wandb(f"{failing}:raise")
    run_to_the_end(tmp_path)
    warnings = capsys.readouterr().err
    assert warnings.count("warning:") == 1
    assert "wandb is off for this run (no network); `wandb sync" in warnings
    assert [call[0] for call in fake.calls].count(failing) == 1


def test_where_the_server_is_not_there_it_goes_on_offline(tmp_path, wandb, capsys):
    fake = wandb("init:raise")
    run_to_the_end(tmp_path)
    assert [call[0] for call in fake.calls] == [
        "init",
        "teardown",
        "offline",
        "log",
        "log",
        "finish",
    ]
    notes, warnings = capsys.readouterr()
    assert warnings == "warning: wandb goes on offline (no network)\n"
    assert f"`wandb sync {tmp_path}/wandb/run-1`" in notes and notes.count("\n") == 1


@pytest.mark.parametrize(
    ("failing", "warning"),
    [
        ("import", "wandb is off for this run (No module named 'wandb')"),
        ("init:crash", "the process of wandb ended with code 66"),
        ("log:crash", "the process of wandb ended with code 66"),
    ],
)
def test_one_that_is_missing_or_crashes_costs_a_warning_too(
    tmp_path, wandb, failing, warning, capsys
):
    wandb(failing)
    run_to_the_end(tmp_path)
    said = capsys.readouterr().err
    assert warning in said and said.count("warning:") == 1


@pytest.mark.parametrize("failing", ["init:hang", "log:hang", "finish:hang"])
def test_one_that_hangs_is_not_waited_for(tmp_path, wandb, short, failing, capsys):
    fake = wandb(failing)
    trackers = start(tmp_path, trackers=["wandb"])
    process = process_of(trackers)
    before = time.monotonic()
    for step in range(1000):
        trackers.log({"step": step})
    assert time.monotonic() - before < 2
    fake.until("init")
    before = time.monotonic()
    trackers.finish()
    assert time.monotonic() - before < 3 and process.wait(10)
    assert "wandb has not taken everything within 0 s" in capsys.readouterr().err
    assert len(steps(tmp_path)) == 1000


def test_one_that_does_not_even_read_is_not_waited_for(tmp_path, wandb, short, monkeypatch, capsys):
    monkeypatch.setattr(dashboards, "HELD_LINES", 100)
    wandb()
    trackers = start(tmp_path, trackers=["wandb"])
    process = process_of(trackers)
    process.send_signal(signal.SIGSTOP)
    for step in range(200):
        trackers.log({"step": step, "text": "x" * 4096})
    trackers.finish()
    assert process.wait(10) == -signal.SIGKILL
    said = capsys.readouterr().err
    assert "wandb was left out of" in said and "ended with code -9" in said
    assert len(steps(tmp_path)) == 200


@pytest.mark.parametrize("why", ["failed", "asked"])
def test_a_run_that_must_go_leaves_it_behind(tmp_path, wandb, monkeypatch, why):
    """And it ends by itself."""
    monkeypatch.setattr(dashboards, "FINISH_SECONDS", 4.0)
    monkeypatch.setattr(dashboards, "LEAVE_SECONDS", 0.2)
    monkeypatch.setattr(dashboards.stopping, "asked", lambda: signal.SIGTERM * (why == "asked"))
    fake = wandb("finish:hang")
    with suppress(KeyError), start(tmp_path, trackers=["wandb"]) as trackers:
        process = process_of(trackers)
        fake.until("init")
        before = time.monotonic()
        if why == "failed":
            raise KeyError
    assert time.monotonic() - before < 3 and process.poll() is None
    fake.until("finish")
    assert fake.calls[-1] == ("finish", {"code": int(why == "failed")})
    assert process.wait(10) == 1


@pytest.fixture
def made(tmp_path):
    """What a run has made: 2 MB."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/weights").write_bytes(bytes(2_000_000))
    return {}


def test_files_get_the_time_that_they_take(tmp_path, wandb, short, made, capsys):
    wandb("artifact:hang")
    trackers = start(tmp_path, trackers=["wandb"])
    trackers.deliver(tmp_path, made)
    before = time.monotonic()
    trackers.finish()
    assert 2.4 < time.monotonic() - before < 6
    assert "wandb has not taken everything within 2 s" in capsys.readouterr().err


def test_one_that_has_not_even_begun_gets_no_time_for_files(tmp_path, wandb, short, made):
    wandb("init:hang")
    trackers = start(tmp_path, trackers=["wandb"])
    trackers.deliver(tmp_path, made)
    before = time.monotonic()
    trackers.finish()
    assert time.monotonic() - before < 2.4


def test_the_time_for_files_has_an_end_and_tensorboard_sends_none(tmp_path, made, monkeypatch):
    monkeypatch.setattr(dashboards, "SEND_RATE", 1.0)
    for name, seconds in (("wandb", dashboards.SEND_SECONDS), ("tensorboard", 0)):
        monkeypatch.setattr(dashboards.Dashboard, "_start", lambda self: None)
        board = dashboards.Dashboard(name, {})
        board.show("artifact", name="full", kind="model", paths=[str(tmp_path / "full")])
        assert board.seconds_for_files == seconds


def test_how_a_run_ended_is_shown_though_its_files_were_cut_off(tmp_path, wandb, short, made):
    fake = wandb("artifact:hang")
    with start(tmp_path, trackers=["wandb"]) as trackers:
        trackers.log({"step": 1})
        trackers.deliver(tmp_path, made)
    fake.until("finish")
    assert [call[0] for call in fake.calls] == ["init", "log", "artifact", "init", "finish"]
    first, again = (call[1] for call in fake.calls if call[0] == "init")
    assert first["id"] == again["id"] and fake.calls[-1] == ("finish", {"code": 0})


@pytest.mark.parametrize("how", ["signal", "Ctrl-C"])
def test_one_that_is_asked_to_end_while_it_waits_does_so_at_once(
    tmp_path, wandb, monkeypatch, how, capsys
):
    monkeypatch.setattr(dashboards, "FINISH_SECONDS", 20.0)
    monkeypatch.setattr(dashboards, "TELL_SECONDS", 0.1)
    fake, asked = wandb("finish:hang"), []
    monkeypatch.setattr(dashboards.stopping, "asked", lambda: len(asked))
    trackers = start(tmp_path, trackers=["wandb"])
    process = process_of(trackers)
    fake.until("init")

    def attend(board, waited):
        if waited > 0.3:
            asked.append(signal.SIGTERM)
            if how == "Ctrl-C":
                raise KeyboardInterrupt

    monkeypatch.setattr(dashboards.Dashboard, "attend", attend)
    before = time.monotonic()
    trackers.finish()
    assert time.monotonic() - before < 3 and process.poll() is None
    notes = capsys.readouterr().out
    assert "waiting until wandb has everything, 20 s at the most" in notes
    assert ("wandb: sending goes on without the run" in notes) == (how == "signal")
    process.kill()


def test_several_are_waited_for_together(tmp_path, wandb, monkeypatch, capsys):
    monkeypatch.setattr(dashboards, "FINISH_SECONDS", 1.5)
    wandb("init:hang")
    hello = introduction(tmp_path, {}, TrackingConfig(project="p"))
    boards = [dashboards.Dashboard("wandb", hello) for _ in range(3)]
    before = time.monotonic()
    dashboards.finish(boards)
    assert time.monotonic() - before < 4
    assert capsys.readouterr().err.count("warning: wandb has not taken everything") == 3


def test_one_that_is_killed_is_said_at_the_next_line(tmp_path, wandb, capsys):
    fake = wandb()
    trackers = start(tmp_path, trackers=["wandb"])
    process = process_of(trackers)
    fake.until("init")
    process.kill()
    process.wait()
    for step in (1, 2):
        trackers.log({"step": step})
        said = capsys.readouterr().err
        assert ("the process of wandb ended with code -9" in said) == (step == 1)
    trackers.finish()
    assert not capsys.readouterr().err


def test_norms_that_cannot_be_taken_cost_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dashboards.Dashboard, "_start", lambda self: None)
    trackers = Trackers([dashboards.Dashboard("wandb", {})])

    def fail(model):
        raise RuntimeError("out of memory\nand a page about it")

    monkeypatch.setattr("train.norms.of", fail)
    for step in (1, 2):
        trackers.norms(step, None)
    said = "warning: dashboards go on without norms (out of memory)\n"
    assert capsys.readouterr().err == said


def test_notes_are_no_part_of_a_quiet_run_and_no_error_where_nobody_reads(capsys, monkeypatch):
    with screens.speaking(screens.Way(quiet=True)):
        dashboards.note("wandb: https://dashboard")
        dashboards.warn("wandb is off")
    assert capsys.readouterr() == ("", "warning: wandb is off\n")
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.FileIO(full, "w"), write_through=True))
    dashboards.note("wandb: https://dashboard")


def test_one_whose_run_is_gone_before_it_looks_ends_too(tmp_path, wandb):
    """As its parent, which it then has another of, would not tell."""
    wandb("finish:hang")
    gone = subprocess.Popen(["true"])
    gone.wait()
    hello = introduction(tmp_path, {}, TrackingConfig(project="p"))
    line = {**hello, "pid": gone.pid, "seconds": 0.2}
    process = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "train/dashboard_process.py"), "wandb"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    process.stdin.write(json.dumps(line).encode() + b"\n")
    process.stdin.flush()
    assert process.wait(20) == 1
    process.stdin.close()


def test_signals_to_all_processes_of_a_job_are_not_for_it(tmp_path, wandb):
    fake = wandb()
    trackers = start(tmp_path, trackers=["wandb"])
    fake.until("init")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        process_of(trackers).send_signal(number)
    trackers.log({"step": 1})
    trackers.finish()
    assert [call[0] for call in fake.calls] == ["init", "log", "finish"]


def test_one_whose_run_is_killed_sends_what_it_has_and_ends(tmp_path, wandb):
    fake = wandb("finish:hang")
    script = f"""
import os, signal, sys
from pathlib import Path
from train import dashboards
dashboards.FINISH_SECONDS = 0.5
from train.config import TrackingConfig
from train.tracking import introduction
hello = introduction(Path({str(tmp_path)!r}), {{}}, TrackingConfig(project="p"))
board = dashboards.Dashboard("wandb", hello)
board.log({{"step": 1}})
print(board._process.pid, flush=True)
if not os.fork():  # a worker of the loader, that holds on to the pipe
    import time
    time.sleep(15)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pid = int(killed.stdout.readline())
    fake.until("log")
    killed.stdin.close()
    assert killed.wait(10) == -signal.SIGKILL
    fake.until("finish")
    assert fake.calls[-1] == ("finish", {"code": 1})
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_resumed_run_continues_on_the_same_dashboard(tmp_path, wandb):
    fake = wandb()
    for at in (0, 1):
        trackers = start(tmp_path, at=at, trackers=["wandb"])
        trackers.log({"step": at + 1})
        trackers.finish()
    first, second = (call[1] for call in fake.calls if call[0] == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert [call[1]["step"] for call in fake.calls if call[0] == "log"] == [1, 2]


def test_an_id_that_a_full_disk_left_empty_is_made_again(tmp_path, wandb):
    fake = wandb()
    (tmp_path / "wandb_id.txt").write_text("")
    run_to_the_end(tmp_path)
    assert fake.calls[0][1]["id"] == (tmp_path / "wandb_id.txt").read_text() != ""
