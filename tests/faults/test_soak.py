"""One run, killed thirty times at random moments: it loses nothing, and ends in the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.chains import APPLY, FORWARD, command, contents, differing, newest, steps_of
from tests.faults.injected import Fault, record
from tests.faults.processes import Run, Starter

KILLS, STEPS = 30, 200
SECONDS = 1.5  # about what a run takes to its first step
RUN = (f"train.steps={STEPS}", "checkpoint.keep=2", "checkpoint.every=1", "tracking.every=4")
PLACES = (APPLY, FORWARD, "os:fsync", "os:replace", "train.checkpoint:Checkpoints.save")


@pytest.mark.slow
def test_thirty_kills_lose_nothing(starter: Starter, world: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("SOAK_SEED", random.randrange(1 << 32)))
    print(f"SOAK_SEED={seed} repeats this choice of moments")
    draw = random.Random(seed)
    through, output, records = tmp_path / "through", tmp_path / "run", tmp_path / "steps.jsonl"
    starter.finish(*command("lora", world, through, *RUN))
    asked = command("lora", world, output, *RUN)
    kills, began = 0, []
    while kills < KILLS:
        before = newest(output)
        assert before < STEPS, f"the run was done after {kills} kills"
        seen = len(steps_of(records))
        inside = [
            Fault(
                at=draw.choice(PLACES),
                do="kill",
                call=draw.randint(1, 12),
                after=draw.random() < 0.5,
            )
        ]
        inside = inside if draw.random() < 0.5 else []
        run = starter.start(*asked, faults=[*inside, record(records, APPLY, after=True)])
        if not inside:
            kill_from_outside(run, draw, output, before)
        (code,) = run.wait()
        assert code == -signal.SIGKILL, f"exit code {code}\n{run.output}"
        kills += 1
        assert newest(output) >= before
        first = steps_of(records)[seen:][:1]
        # The newest checkpoint was complete, whenever the kill came, and no step before it is lost.
        assert [step.number for step in first] in ([], [before])
        began += first
    starter.finish(*asked)
    print(f"{kills} kills, of which {len(began)} came when training had begun")
    assert len(began) > KILLS / 3
    assert differing(contents(through), contents(output)) == []


def kill_from_outside(run: Run, draw: random.Random, output: Path, start: int) -> None:
    """At any moment from the start of the process to a few steps after its first."""
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0, SECONDS))
    else:
        steps = draw.randint(1, 3)
        run.until(lambda: newest(output) >= start + steps)
        time.sleep(draw.uniform(0, 0.1))
    run.signal(signal.SIGKILL)
