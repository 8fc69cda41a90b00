import json
import sys
from types import SimpleNamespace

import pytest

from train.config import TrackingConfig
from train.tracking import MetricsFile, open_trackers, read_metrics


def start(output, *, at=0, main=True, trackers=()):
    config = TrackingConfig(trackers=list(trackers), project="p")
    return open_trackers(output, {"seed": 0}, config, start=at, main=main)


def steps(output):
    return [line["step"] for line in read_metrics(output / "metrics.jsonl")]


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
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
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


def test_only_the_main_process_writes(tmp_path):
    trackers = start(tmp_path, main=False, trackers=["wandb"])
    trackers.log({"step": 1})
    trackers.finish()
    assert not list(tmp_path.iterdir())


class FakeWandb(SimpleNamespace):
    """Records calls; fails where told to."""

    def __init__(self, fails=()):
        super().__init__(calls=[], fails=set(fails))

    def _do(self, what, *details):
        self.calls.append((what, *details))
        if what in self.fails:
            raise ConnectionError("no network")

    def init(self, **settings):
        self._do("init", settings)
        return SimpleNamespace(
            log=lambda metrics, step: self._do("log", step), finish=lambda: self._do("finish")
        )


@pytest.fixture
def wandb(monkeypatch):
    def install(**settings):
        fake = FakeWandb(**settings)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_dashboard_costs_a_warning_and_nothing_else(tmp_path, wandb, failing, capsys):
    fake = wandb(fails=[failing])
    trackers = start(tmp_path, trackers=["wandb"])
    for step in (1, 2):
        trackers.log({"step": step})
    trackers.finish()
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("warning: wandb is off") == 1
    assert [call[0] for call in fake.calls].count(failing) == 1


def test_a_missing_wandb_is_a_warning_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(tmp_path, trackers=["wandb"]).log({"step": 1})
    assert steps(tmp_path) == [1] and "warning: wandb" in capsys.readouterr().err


def test_a_resumed_run_continues_on_the_same_dashboard(tmp_path, wandb):
    fake = wandb()
    for at in (0, 1):
        trackers = start(tmp_path, at=at, trackers=["wandb"])
        trackers.log({"step": at + 1})
        trackers.finish()
    first, second = (call[1] for call in fake.calls if call[0] == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert [call[1] for call in fake.calls if call[0] == "log"] == [1, 2]
