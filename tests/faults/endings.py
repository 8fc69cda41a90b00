"""Runs that are asked to end, and what they must leave behind."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.chains import contents, differing
from tests.faults.injected import Fault
from tests.faults.processes import Run, Starter

CODES = {"SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130, "SIGHUP": 129}
# One checkpoint at the end and at each interruption, and none is pruned.
SPARSE = ("checkpoint.every=100", "checkpoint.keep=99", "preview.every=0")
_SECONDS = 40.0  # for the loader's processes to follow


def steps(output: Path) -> list[int]:
    """Those that have a checkpoint. There is nothing else in the folder, half a checkpoint say."""
    names = [path.name for path in (output / "checkpoints").glob("[!b]*")]  # but best.json
    assert all(name.startswith("step-") for name in names), names
    return sorted(int(name.removeprefix("step-")) for name in names)


def interruption(output: Path) -> dict[str, Any]:
    """What OUTPUT/interrupted.json says, without the time."""
    said = json.loads((output / "interrupted.json").read_text(encoding="utf-8"))
    del said["time"]
    return dict(said)


def ended_by(name: str, run: Run, output: Path, *, step: int | None, timeout: float = 90) -> None:
    """Waits for a run that was asked to end by the signal of this name: every process ends with the
    code for it, nothing lives on, and after `step` it has said so and saved."""
    codes = run.wait(timeout)
    assert codes == [CODES[name]] * len(codes), f"{codes}\n{run.output}"
    nothing_lives(run)
    assert interruption(output) == {"signal": name, "exit_code": CODES[name], "step": step}
    assert "Traceback" not in run.output
    assert run.output.count("the same command goes on from there") == 1
    if step:
        assert steps(output)[-1] == step


def nothing_lives(run: Run) -> None:
    """Nor do the processes of the loader, which may take a moment."""
    until = time.monotonic() + _SECONDS
    while run.alive():
        assert time.monotonic() < until, f"{run.alive()} live on\n{run.output}"
        time.sleep(0.02)


def by_itself(name: str, at: str, call: int = 1, **more: Any) -> Fault:
    """A signal that reaches a process of the run just there."""
    assert name in CODES and signal.Signals[name]
    return Fault(at=at, do=name, call=call, **more)


def same_end(output: Path, reference: Path) -> None:
    """Everything that the reference has is the same to the last bit; other checkpoints besides do
    not matter."""
    wanted, found = contents(reference), contents(output)
    assert len(wanted) > 3
    assert differing(wanted, {name: found[name] for name in wanted.keys() & found.keys()}) == []


def finished(starter: Starter, command: Sequence[str], output: Path, **options: Any) -> str:
    """The same command once more, to the end; what it printed."""
    said = starter.finish(*command, **options)
    assert not (output / "interrupted.json").exists()
    return said
