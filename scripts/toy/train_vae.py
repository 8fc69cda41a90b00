"""Trains the toy VAE on the whole toy world: every style and subject, in aligned crops of 64
pixels.

    accelerate launch scripts/toy/train_vae.py --config configs/toy/recipe/vae.yaml

The result is OUTPUT/vae, a diffusers AutoencoderKL whose scaling_factor makes its latents
unit-variance.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.counter import generator
from scripts.toy.architecture import build_vae
from scripts.toy.renders import to_pixels, wide_world
from train import export
from train.config import LoopConfig, OptimConfig, command, load
from train.launch import open_accelerator
from train.loop import fit

PICTURES = 8000
CROP = 64  # pixels


def main(arguments: list[str]) -> None:
    config = load(LoopConfig, arguments)
    accelerator = open_accelerator(config.train.mixed_precision)
    torch.manual_seed(config.seed)
    crops = Crops(wide_world(config.seed, PICTURES)[0], config)
    method = Vae(crops.pictures)
    fit(method, crops, config, accelerator)
    export.publish(method, config.output / "vae", accelerator)


class Crops:
    """Batches of random crops whose corners lie on the latent grid of 8 pixels, as in a whole
    picture."""

    held_out = None

    def __init__(self, pictures: list[np.ndarray], config: LoopConfig) -> None:
        self.pictures, self._config = pictures, config
        self._each = len(pictures) // config.train.batch_size

    def epochs(self, steps: int) -> float:
        return steps / self._each

    def work(self, micro_batches: Any) -> float:
        return 0.0

    def __call__(self, start: int) -> Iterable[list[dict[str, Any]]]:
        for step in range(start, self._config.train.steps):
            yield [self._batch(generator(self._config.seed, "crops", step))]

    def _batch(self, rng: np.random.Generator) -> dict[str, Any]:
        size = self._config.train.batch_size
        crops = [
            self._crop(self.pictures[i], rng) for i in rng.integers(len(self.pictures), size=size)
        ]
        return {"pixels": to_pixels(crops), "weight": torch.full((size,), 1 / size)}

    @staticmethod
    def _crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left = (8 * rng.integers((side - CROP) // 8 + 1) for side in picture.shape[:2])
        return picture[top : top + CROP, left : left + CROP]


class Reconstruction(nn.Module):
    """L1 + squares + L1 of gradients (edges) + a light KL term -> losses (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = build_vae()
        with torch.no_grad():
            # Start nearly deterministic: unit posterior noise would drown the first thousand steps.
            self.vae.quant_conv.weight[4:] *= 0.1
            self.vae.quant_conv.bias[4:] = -6.0

    def forward(self, batch: dict[str, Any]) -> Tensor:
        pixels = batch["pixels"]
        posterior = self.vae.encode(pixels).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - pixels
        edges = error.diff(dim=-1).abs().flatten(1).mean(1) + error.diff(dim=-2).abs().flatten(
            1
        ).mean(1)
        reconstruction = error.abs().flatten(1).mean(1) + 0.5 * error.square().flatten(1).mean(1)
        return reconstruction + 0.5 * edges + 1e-6 * posterior.kl().float() / 64


class Vae:
    """The seam's class for the VAE; there is no pipeline to preview."""

    def __init__(self, pictures: list[np.ndarray]) -> None:
        self.model = Reconstruction()
        self._pictures = pictures

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def pipeline(self) -> None:
        return None

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        vae = self.model.vae.eval()
        squares = [picture for picture in self._pictures[:256] if picture.shape[:2] == (128, 128)]
        latents = vae.encode(to_pixels(squares)).latent_dist.mean
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
        vae.save_pretrained(str(directory))


if __name__ == "__main__":
    command(main)
