"""Case 22: the tracker is refused, swallowed by a black hole, or fails in the middle of a run ->
training completes, metrics.jsonl is whole, what was not sent can be sent later, and a resumed run
is the same run on the dashboard.

With wandb itself, against servers of our own.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.injected import Fault
from tests.faults.processes import Starter
from tests.faults.removals import Removal
from tests.faults.wandb_server import black_hole, eventually, refused, server
from tests.runs import ROOT, arguments
from train.tracking import read_metrics

WITHOUT = [
    Removal(
        "the end of a run waits a bounded time for a dashboard",
        "train/dashboards.py",
        "FINISH_SECONDS = 30.0",
        "FINISH_SECONDS = 3000.0",
    ),
    Removal(
        "a run that was asked to end waits less",
        "train/dashboards.py",
        "LEAVE_SECONDS = 5.0",
        "LEAVE_SECONDS = 29.0",
    ),
    Removal(
        "the run's id on the dashboard is kept with it",
        "train/boards.py",
        "    if not known:\n",
        "    if True:\n",
    ),
    Removal(
        "a dashboard that is gone is no error of the run",
        "train/dashboards.py",
        "        except OSError:  # it has ended, and said why\n",
        "        except InterruptedError:\n",
        "killed",
    ),
    Removal(
        "the axis is our step, which may go back",
        "train/board_wandb.py",
        "for curve, value in drawn(line)})",
        "for curve, value in drawn(line)}, step=line[AXIS])",
    ),
    Removal(
        "training never waits for a dashboard",
        "train/dashboards.py",
        "            self._left_out += 1\n        self._listen()",
        "            self._left_out += 1\n        while not self._done:\n"
        "            self._listen()",
    ),
    Removal(
        "where no server answers it goes on offline",
        "train/board_wandb.py",
        "        except Exception as error:\n            self._why",
        "        except KeyError as error:\n            self._why",
    ),
]


AT_THE_END, WHEN_ASKED = 30, 5  # seconds that a run waits for its dashboard at the most

pytestmark = pytest.mark.slow
At = Callable[[str], dict[str, str | None]]


@pytest.fixture
def at(tmp_path: Path) -> At:
    """The environment of a run whose wandb looks for its server at a URL."""

    def environment(url: str) -> dict[str, str | None]:
        return {
            "HOME": str(tmp_path),
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": url,
            "WANDB_MODE": None,
            "WANDB_ERROR_REPORTING": "false",
        }

    return environment


def tracked(world: Path, output: Path, *overrides: str) -> list[str]:
    return arguments(world, output, "tracking.trackers=[wandb]", "preview.every=0", *overrides)


def steps(output: Path) -> list[int]:
    lines = read_metrics(output / "metrics.jsonl")
    return [line["step"] for line in lines if "loss" in line]


def sendable(said: str) -> list[Path]:
    """The files with what `wandb sync` of the folders that were named would send."""
    named = re.findall(r"`wandb sync (.*?)`", said)
    return [path for name in named for path in Path(*shlex.split(name)).glob("*.wandb")]


def killed_then_resumed(starter: Starter, world: Path, output: Path, env: Any) -> str:
    """A run that is killed before it logs step 4, where its last checkpoint is that of step 2, and
    goes on; returns what it then says."""
    kill = Fault(at="train.tracking:MetricsFile.log", call=4, do="kill")
    # The stand-in for a server takes no files.
    command = ("train/lora.py", *tracked(world, output, "tracking.artifacts=false"))
    starter.finish(*command, faults=[kill], env=env, code=-signal.SIGKILL)
    assert steps(output) == [1, 2, 3]
    dashboards_end()
    said = starter.finish(*command, env=env)
    assert steps(output) == [1, 2, 3, 4, 5, 6]
    return said


def dashboards_end() -> None:
    """Those that outlive their run."""
    eventually(lambda: not processes("dashboard_process.py"), AT_THE_END + 30)


def processes(name: str) -> list[int]:
    """Of a script, in this test's own tree."""
    ours = str(ROOT / "train" / name)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if ours in path.read_text(errors="replace").split("\0"):
                found.append(int(path.parent.name))
    return found


def test_a_resumed_run_is_the_same_on_the_dashboard(
    starter: Starter, world: Path, tmp_path: Path, at: At
) -> None:
    with server() as wandb:
        said = killed_then_resumed(starter, world, tmp_path / "run", at(wandb.url))
        first, second = wandb.ids
        assert first == second
        # What was logged after the checkpoint comes twice, and replaces nothing that came before.
        assert wandb.steps() == [1, 2, 3, 3, 4, 5, 6]
        assert not any("code" in name or "patch" in name for name in wandb.files)
        assert "warning" not in said and wandb.url in said


def test_so_it_is_without_a_network_by_intention(
    starter: Starter, world: Path, tmp_path: Path, at: At
) -> None:
    offline = at(refused()) | {"WANDB_MODE": "offline"}
    said = killed_then_resumed(starter, world, tmp_path / "run", offline)
    parts = [path.name for path in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(parts) == 2 and len({name.rpartition("-")[2] for name in parts}) == 1
    assert len(sendable(said)) == 1 and "warning" not in said


def test_a_run_that_is_to_end_while_wandb_starts_does_so_at_once(
    starter: Starter, world: Path, tmp_path: Path, at: At
) -> None:
    output = tmp_path / "run"
    with black_hole() as url:
        run = starter.start(
            "train/lora.py", *tracked(world, output, "train.steps=100000"), env=at(url)
        )
        run.until(lambda: len(steps(output)) > 2)
        run.signal(signal.SIGTERM)
        since = time.monotonic()
        assert run.wait(60) == [128 + signal.SIGTERM]
        assert time.monotonic() - since < WHEN_ASKED + 20


def test_a_server_that_refuses_or_never_answers_costs_a_bounded_wait_at_the_end(
    starter: Starter, world: Path, tmp_path: Path, at: At
) -> None:
    with black_hole() as hole:
        runs = {
            tmp_path / name: starter.start(
                "train/lora.py", *tracked(world, tmp_path / name), env=at(url)
            )
            for name, url in (("refused", refused()), ("hole", hole))
        }
        for output, run in runs.items():
            run.until(lambda output=output: len(steps(output)) == 6)
        since = time.monotonic()
        for output, run in runs.items():
            assert run.wait(AT_THE_END + 60) == [0], run.output
            assert steps(output) == [1, 2, 3, 4, 5, 6]
            assert (output / "adapter").is_dir()
            assert run.output.count("warning: wandb") == 1
        assert time.monotonic() - since < AT_THE_END + 22
    dashboards_end()


def test_a_server_that_refuses_a_long_run_has_it_kept_to_be_sent_later(
    starter: Starter, world: Path, tmp_path: Path, at: At
) -> None:
    """As the test before, but wandb has the time to give up."""
    output = tmp_path / "run"
    run = starter.start("train/lora.py", *tracked(world, output), env=at(refused()))
    run.until(lambda: len(steps(output)) > 2)
    run.signal(signal.SIGSTOP)
    eventually(lambda: list(output.glob("wandb/offline-run-*")), 90)
    run.signal(signal.SIGCONT)
    assert run.wait(60) == [0], run.output
    assert steps(output) == [1, 2, 3, 4, 5, 6]
    assert run.output.count("warning: wandb goes on offline") == 1
    assert len(sendable(run.output)) == 1


def test_a_server_that_dies_costs_a_bounded_wait_and_what_it_missed_is_kept(
    starter: Starter, world: Path, tmp_path: Path, at: At
) -> None:
    output = tmp_path / "run"
    with server() as wandb:
        run = starter.start("train/lora.py", *tracked(world, output), env=at(wandb.url))
        run.until(lambda: len(steps(output)) > 2)
        run.signal(signal.SIGSTOP)
        eventually(lambda: wandb.rows)
    run.signal(signal.SIGCONT)
    assert run.wait(AT_THE_END + 60) == [0], run.output
    assert steps(output) == [1, 2, 3, 4, 5, 6]
    assert run.output.count("warning: wandb has not taken everything") == 1
    assert len(sendable(run.output)) == 1


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_dashboard_that_is_killed_costs_the_run_nothing(
    starter: Starter, world: Path, tmp_path: Path, at: At, name: str
) -> None:
    pytest.importorskip(name)
    output = tmp_path / "run"
    environment = at(refused()) | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "kept")}
    given = tracked(world, output, f"tracking.trackers=[{name}]", "preview.every=2")
    run = starter.start("train/lora.py", *given, env=environment)
    run.until(lambda: len(steps(output)) > 1)
    (dashboard,) = processes("dashboard_process.py")
    os.kill(dashboard, signal.SIGKILL)
    assert run.wait(60) == [0], run.output
    assert steps(output) == [1, 2, 3, 4, 5, 6]
    assert (output / "adapter").is_dir() and (output / "report.html").is_file()
    assert f"warning: the process of {name} ended with code -9" in run.output
    assert run.output.count("warning") == 1
