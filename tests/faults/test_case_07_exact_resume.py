"""Case 7: a run is killed in the middle of a step, at an epoch's edge, twice in one epoch -> the
same command goes on, and weights, optimizer, averages, rates, losses and samples are those of a run
that nothing interrupted, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chains import (
    METHODS,
    Kill,
    by_step,
    command,
    contents,
    differing,
    killed,
    newest,
    whole,
)
from tests.faults.processes import Starter
from tests.faults.removals import Removal

# Of the tests below, the ones that a removal is to turn red.
LORA, FULL = "dreambooth-0-1", "full-0-1"
WITHOUT = [
    Removal(
        "the samples go on from where the run stopped",
        "train/loop.py",
        "enumerate(meter.waiting(batches(start)), start)",
        "enumerate(meter.waiting(list(batches(0))[: steps - start]), start)",
        LORA,
    ),
    Removal(
        "dropout is drawn anew from each step",
        "train/loop.py",
        "            seed_step(config.seed, step, accelerator)\n",
        "",
        LORA,
    ),
    Removal(
        "the moving averages are restored",
        "train/loop.py",
        "checkpoints.load(start, model, optimizer, averages, verified=True)",
        "checkpoints.load(start, model, optimizer, None, verified=True)",
        FULL,
    ),
    Removal(
        "a line of metrics.jsonl has the steps before the kill too",
        "train/loop.py",
        'before=facts.get("meter"),',
        "before=None,",
        LORA,
    ),
    Removal(
        "each process has its own part of that line again",
        "train/meter.py",
        "self._loss += losses[self._accelerator.process_index]",
        "self._loss += sum(losses) if main else 0",
        "lora-2-2",
    ),
    Removal(
        "metrics.jsonl loses the steps that are repeated",
        "train/loop.py",
        "config.tracking, start=start, main=main)",
        "config.tracking, start=start and steps, main=main)",
        LORA,
    ),
    Removal(
        "noise is a function of seed, step and picture",
        "data/noising.py",
        'noise = counter.normal(shape, seed, "noise", *purpose)',
        "noise = np.random.standard_normal(shape).astype(np.float32)",
        LORA,
    ),
    Removal(
        "the order is a function of seed and epoch",
        "data/order.py",
        'counter.generator(self.seed, "order", *purpose).permutation(count)',
        "np.random.permutation(count)",
        LORA,
    ),
]
# 9 pictures in buckets of 2, 5 and 2: an epoch has four steps, of 4, 2, 2 and 1 in some order.
EPOCH, STEPS = 4, 8
RUN = (
    f"train.steps={STEPS}",
    "train.micro_batch_size=1",
    "checkpoint.every=2",
    "tracking.every=3",
    "diffusion.noise_offset=0.1",
)
CELLS = [
    ("lora", 2, 2),
    ("dreambooth", 0, 1),
    ("textual inversion", 0, 1),
    ("full", 0, 1),
]
SLOW = [
    (method, workers, processes)
    for method in METHODS
    for workers in (0, 2)
    for processes in (1, 2)
    if (method, workers, processes) not in CELLS
]


@pytest.mark.parametrize(
    "method, workers, processes",
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in SLOW)],
)
def test_killed_and_resumed_is_as_if_nothing_had_been(
    starter: Starter, world: Path, tmp_path: Path, method: str, workers: int, processes: int
) -> None:
    check(starter, world, tmp_path, method, f"data.workers={workers}", processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.name=prodigy", "optim.learning_rate=1"),
        ("optim.name=schedule_free", "optim.schedule=constant"),
        ("optim.name=adafactor",),
        ("train.mixed_precision=bf16", "lora.dora=true", "train.gradient_checkpointing=true"),
        ("checkpoint.asynchronous=false", "preview.every=3", "train.ema_decay=0.9"),
        ("data.crop=random", "diffusion.timesteps=stratified", "diffusion.input_perturbation=0.1"),
        ("validation.path=PICTURES", "validation.every=3", "validation.use_best=true"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_whatever_is_trained_with(
    starter: Starter, world: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    overrides = tuple(one.replace("PICTURES", str(world / "large")) for one in overrides)
    check(starter, world, tmp_path, "lora", *overrides)


def check(
    starter: Starter, world: Path, folder: Path, method: str, *overrides: str, processes: int = 1
) -> None:
    """That a run ends in the same when it is killed four times."""
    through, output = folder / "through", folder / "run"
    records = folder / "through.jsonl"
    asked = command(method, world, through, *RUN, *overrides)
    reference = by_step(whole(starter, asked, records, processes=processes))
    sizes = [len(reference[step, 0].batches) for step in range(STEPS)]
    first = max(range(EPOCH), key=sizes.__getitem__)
    last = max(range(EPOCH + 2, STEPS), key=sizes.__getitem__)
    kills = [
        Kill(first, sizes[first] // 2),  # between two micro-batches
        Kill(EPOCH),  # an epoch has ended, and its checkpoint is written or about to be
        Kill(EPOCH + 1),  # in the second epoch, and once more
        Kill(last, sizes[last] // 2),
    ]
    asked, records = command(method, world, output, *RUN, *overrides), folder / "run.jsonl"
    for kill in kills:
        start = newest(output)
        own = killed(
            starter,
            asked,
            records,
            kill,
            start=start,
            micro_batches=sizes.__getitem__,
            processes=processes,
        )
        ranks = [[step for step in own if step.rank == rank] for rank in range(processes)]
        assert {steps[0].number for steps in ranks} == {start}
        assert (kill.step, kill.batch) in [(s[-1].number, len(s[-1].batches)) for s in ranks]
    tried = whole(starter, asked, records, processes=processes)
    for step in tried:
        twin = reference[step.number, step.rank]
        assert step.rates == twin.rates
        assert step.batches == twin.batches[: len(step.batches)]
    finished = by_step(tried)
    assert finished.keys() == reference.keys()
    assert all(finished[key].batches == reference[key].batches for key in reference)
    assert differing(contents(through), contents(output)) == []
