"""Case 13: 7 pictures in three shapes for 2 processes -> both do equally many steps and passes of
the network, all of one step in one shape; every epoch has every picture exactly once, and what
stands twice to fill up a step weighs nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.chains import Step, command, whole
from tests.faults.processes import Starter
from tests.faults.removals import Removal

WITHOUT = [
    Removal(
        "padding weighs nothing",
        "data/order.py",
        "np.where(positions < count, np.float32(1 / count), np.float32(0))",
        "np.full(len(positions), np.float32(1 / count))",
    ),
    Removal(
        "shares are padded, not cut",
        "data/order.py",
        "np.arange(rank, -(-count // world) * world, world)",
        "np.arange(rank, max(count // world, 1) * world, world)",
    ),
    Removal(
        "shares are padded to be equal",
        "data/order.py",
        "np.arange(rank, -(-count // world) * world, world)",
        "np.arange(min(rank, count - 1), count, world)",
    ),
    Removal(
        "a batch is of one bucket",
        "data/order.py",
        "np.unique(pack(sizes), return_inverse=True)",
        "np.unique(pack(np.full_like(sizes, 64)), return_inverse=True)",
    ),
]
SHAPES = {(64, 64): 3, (80, 48): 3, (48, 80): 1}
EPOCHS = 2


@pytest.fixture(scope="module")
def pictures(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of the world, cut to the three shapes."""
    folder = tmp_path_factory.mktemp("seven")
    sizes = [size for size, count in SHAPES.items() for _ in range(count)]
    for size, path in zip(sizes, sorted((world / "large").glob("*.png")), strict=False):
        Image.open(path).resize(size).save(folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"a picture of {path.stem}")
    return folder


@pytest.mark.parametrize(
    "batch_size, repeats",
    [
        (2, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
        pytest.param(5, 2, marks=pytest.mark.slow),
        pytest.param(7, 1, marks=pytest.mark.slow),
    ],
)
def test_both_processes_do_as_much_and_every_picture_counts_once(
    starter: Starter, world: Path, tmp_path: Path, pictures: Path, batch_size: int, repeats: int
) -> None:
    counts = [repeats * count for count in SHAPES.values()]
    epoch = sum(-(-count // batch_size) for count in counts)
    asked = command(
        "lora",
        world,
        tmp_path / "run",
        f"data.sources={json.dumps([{'path': str(pictures), 'repeats': repeats}])}",
        "data.path=null",
        f"train.steps={EPOCHS * epoch}",
        f"train.batch_size={batch_size}",
        "checkpoint.every=1000",
    )
    steps = whole(starter, asked, tmp_path / "steps.jsonl", processes=2)

    ranks = [[step for step in steps if step.rank == rank] for rank in (0, 1)]
    for mine in ranks:
        assert [step.number for step in mine] == list(range(EPOCHS * epoch))
    for pair in zip(*ranks, strict=True):
        assert len({shape_of(step) for step in pair}) == 1
        rows = [row for step in pair for row in rows_of(step)]
        weights = [weight for _, weight in rows if weight]
        assert sum(weights) == pytest.approx(1)
        assert max(weights) == min(weights)
        # At most one position stands twice, and it is one of the step's own pictures.
        padding = [name for name, weight in rows if not weight]
        assert len(padding) == len(weights) % 2
        assert set(padding) <= {name for name, weight in rows if weight}
    every = {path.stem for path in pictures.glob("*.png")}
    for number in range(EPOCHS):
        inside = range(number * epoch, (number + 1) * epoch)
        rows = [row for step in steps if step.number in inside for row in rows_of(step)]
        seen = Counter(Path(name).stem for name, weight in rows if weight)
        assert seen == dict.fromkeys(every, repeats)


def shape_of(step: Step) -> tuple[tuple[int, str], ...]:
    """Samples and the shape of their latents, of each pass of the network."""
    return tuple((len(b["ids"]), shape) for b in step.batches for shape in shapes_in(b))


def shapes_in(batch: dict[str, list[str]]) -> set[str]:
    return {latents.partition(":")[0] for latents in batch["latents"]}


def rows_of(step: Step) -> list[tuple[str, float]]:
    """Name and weight of each sample."""
    return [row for b in step.batches for row in zip(b["ids"], b["weight"], strict=True)]
