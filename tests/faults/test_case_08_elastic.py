"""Case 8: a run is killed and goes on with one process in place of two, and then with two again ->
every step has the samples, noise, timesteps and rates of a run with one process all along, and the
weights agree to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.faults.chains import (
    Kill,
    Step,
    command,
    killed,
    metrics,
    newest,
    samples,
    steps_of,
    whole,
)
from tests.faults.processes import Starter
from tests.faults.removals import Removal

FILE = "adapter/pytorch_lora_weights.safetensors"
WITHOUT = [
    Removal(
        "the order is that of global batches",
        "train/feeding.py",
        "order = pictures.order(seed=config.seed, batch_size=config.pictures_per_step)",
        "order = pictures.order(seed=config.seed + accelerator.num_processes, "
        "batch_size=config.pictures_per_step)",
    ),
    Removal(
        "what is random is drawn for all processes alike",
        "train/feeding.py",
        "        store=store,\n        latent_keys=keys,\n        seed=config.seed,",
        "        store=store,\n        latent_keys=keys,\n        "
        "seed=config.seed + accelerator.process_index,",
    ),
    Removal(
        "gradients are parts of one mean and add up",
        "train/loop.py",
        "accelerator.backward(loss * accelerator.num_processes)",
        "accelerator.backward(loss)",
    ),
]
STEPS = 8
# As in tests/test_lora.py: dropout is drawn by each process, and an epsilon so large that the
# rounding of tiny gradients decides nothing.
RUN = (
    f"train.steps={STEPS}",
    "train.micro_batch_size=4",
    "lora.dropout=0",
    "optim.learning_rate=1e-3",
    "optim.eps=1e-6",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "tracking.every=3",
)


def test_two_processes_then_one_then_two_again_train_as_one(
    starter: Starter, world: Path, tmp_path: Path
) -> None:
    one, output = tmp_path / "one", tmp_path / "run"
    alone = by_number(whole(starter, command("lora", world, one, *RUN), tmp_path / "one.jsonl"))
    asked, records = command("lora", world, output, *RUN), tmp_path / "run.jsonl"
    together: dict[int, list[Step]] = {}
    for processes, step in ((2, 3), (1, 7)):
        how = {"start": newest(output), "processes": processes}
        together |= by_number(
            killed(starter, asked, records, Kill(step), micro_batches=lambda _: 1, **how)
        )
    assert newest(output) == 6
    seen = len(steps_of(records))
    whole(starter, asked, records, processes=2)
    together |= by_number(steps_of(records)[seen:])

    assert [len(together[step]) for step in range(STEPS)] == [2, 2, 1, 1, 1, 1, 2, 2]
    for number, (wanted,) in alone.items():
        assert samples(together[number]) == samples([wanted])
        assert all(step.rates == wanted.rates for step in together[number])
    for mine, other in zip(metrics(output), metrics(one), strict=True):
        assert mine == pytest.approx(other, abs=1e-5)
    weights, wanted_weights = load_file(output / FILE), load_file(one / FILE)
    assert weights.keys() == wanted_weights.keys()
    far = {name: (weights[name] - wanted_weights[name]).abs().max() for name in weights}
    assert max(far.values()) < 1e-5


def by_number(steps: list[Step]) -> dict[int, list[Step]]:
    """Of all processes, by optimizer step."""
    numbers = {step.number for step in steps}
    return {number: [step for step in steps if step.number == number] for number in numbers}
