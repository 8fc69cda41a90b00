"""What a step of the training loop costs besides computing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.benchmarks.measuring import spread
from scripts.benchmarks.train_watch import WARM, Timed


def one_parameter(folder: Path, rounds: int, steps: int = 1000) -> dict[str, Any]:
    """Milliseconds of a step of the loop with a model of one number, which is all but computing."""
    import torch
    from torch import nn

    from train.config import LoopConfig
    from train.launch import open_accelerator
    from train.loop import fit

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, batch: dict[str, Any]) -> Any:
            return (batch["x"] - self.weight).square()

    class Toy:
        def __init__(self) -> None:
            self.model = One()

        def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
            return [{"params": [self.model.weight]}]

        def pipeline(self) -> None:
            return None

        def export(self, directory: Path) -> None:
            pass

    class Given:
        def __init__(self) -> None:
            self.steps = steps

        def epochs(self, steps: int) -> float:
            return 0.0

        def work(self, micro_batches: Any) -> float:
            return 0.0

        def __call__(self, start: int) -> Iterator[Any]:
            one = {"x": torch.ones(1), "weight": torch.ones(1), "ids": ["one"]}
            yield from ([dict(one)] for _ in range(steps))

    accelerator = open_accelerator("no")
    taken = []
    for number in range(rounds):
        overrides = {
            "output": folder / f"one-{number}",
            "train": {"steps": steps},
            "preview": {"every": 0},
            "checkpoint": {"every": steps},
        }
        timed = Timed(Given(), lambda: None, steps - WARM - 1)
        fit(Toy(), timed, LoopConfig(**overrides), accelerator)
        taken.append(1000 * timed.seconds / (steps - WARM - 1))
    return {"steps": steps, "milliseconds": spread(taken)}
