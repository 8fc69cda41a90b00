"""The judge of toy pictures: a small classifier that reads shape, colour, size and background.

    python scripts/toy/checker.py output=runs/toy-checker      # trains it

It learns from fresh renders, blurred and noised a little as decoded pictures are, and never sees a
generated one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from data import toy
from data.counter import generator
from scripts.toy.renders import to_pixels
from train import export
from train.config import LoopConfig, OptimConfig, command, load
from train.launch import open_accelerator
from train.loop import fit

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": toy.SHAPES,
    "colour": tuple(toy.COLOURS),
    "size": tuple(toy.SIZES),
    "background": tuple(toy.BACKGROUNDS),
}
WEIGHTS = "checker.safetensors"


class Checker(nn.Module):
    """pixels (B, 3, 128, 128) in [-1, 1] -> logits (B, n) for each attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        # Average and maximum: how much of something there is, and whether there is any.
        self.heads = nn.ModuleDict({n: nn.Linear(128, len(v)) for n, v in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.body(pixels)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: list[np.ndarray]) -> list[dict[str, str]]:
        """What each picture (uint8, 128 x 128 x 3) shows, attribute by attribute."""
        logits = self(to_pixels(pictures))
        chosen = {name: values.argmax(1).tolist() for name, values in logits.items()}
        return [
            {name: ATTRIBUTES[name][chosen[name][row]] for name in ATTRIBUTES}
            for row in range(len(pictures))
        ]


def load_checker(folder: Path) -> Checker:
    checker = Checker()
    checker.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    return checker.eval()


class Reading(nn.Module):
    """Sum of the attributes' cross-entropies -> losses (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.checker = Checker()

    def forward(self, batch: dict[str, Any]) -> Tensor:
        logits = self.checker(batch["pixels"])
        losses = [
            functional.cross_entropy(logits[name].float(), batch[name], reduction="none")
            for name in ATTRIBUTES
        ]
        return torch.stack(losses).sum(0)


class Renders:
    """Batches of renders never repeated, with their attributes as class numbers."""

    held_out = None

    def __init__(self, config: LoopConfig) -> None:
        self._config = config
        self._steps = config.train.steps

    def epochs(self, steps: int) -> float:
        return steps / self._steps

    def work(self, micro_batches: Any) -> float:
        return 0.0

    def __call__(self, start: int) -> Iterable[list[dict[str, Any]]]:
        for step in range(start, self._config.train.steps):
            yield [self._batch(step)]

    def _batch(self, step: int) -> dict[str, Any]:
        size, seed = self._config.train.batch_size, self._config.seed
        scenes = [toy.sample_scene(seed, step * size + row) for row in range(size)]
        pixels = to_pixels([toy.render(scene, 128, 128) for scene in scenes])
        labels = {
            name: torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
            for name, values in ATTRIBUTES.items()
        }
        rng = generator(seed, "augment", step)
        return {"pixels": _soften(pixels, rng), "weight": torch.full((size,), 1 / size), **labels}


def _soften(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Blurs half of the pictures and adds noise, as a decoder does."""
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), "reflect"), 3, 1)
    mix = torch.from_numpy(rng.uniform(size=(len(pixels), 1, 1, 1))).float().mul(2).sub(1).clamp(0)
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32))
    return pixels + mix * (blurred - pixels) + 0.04 * float(rng.uniform()) * noise


class CheckerMethod:
    """The seam's class for the checker."""

    def __init__(self) -> None:
        self.model = Reading()

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def pipeline(self) -> None:
        return None

    def export(self, directory: Path) -> None:
        state = {k: v.half().contiguous() for k, v in self.model.checker.state_dict().items()}
        save_file(state, directory / WEIGHTS)


def main(arguments: list[str]) -> None:
    config = load(LoopConfig, arguments)
    accelerator = open_accelerator(config.train.mixed_precision)
    torch.manual_seed(config.seed)
    method = CheckerMethod()
    fit(method, Renders(config), config, accelerator)
    export.publish(method, config.output / "checker", accelerator)


if __name__ == "__main__":
    command(main)
