"""Trains the toy CLIP, whose image features give the FID and whose cosines give the CLIP score.

    accelerate launch scripts/toy/train_clip.py --config configs/toy/recipe/clip.yaml

It saw every style and subject by name, and shares no weights with the base model's text encoder.
One process: the contrast is within the batch. The result is OUTPUT/clip, a transformers CLIP
folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from data.counter import generator
from scripts.toy.architecture import build_clip, build_tokenizer
from scripts.toy.renders import wide_world
from scripts.toy.vocabulary import vocabulary
from train import export
from train.config import LoopConfig, OptimConfig, command, load
from train.launch import open_accelerator
from train.loop import fit

PICTURES = 16000


def main(arguments: list[str]) -> None:
    config = load(LoopConfig, arguments)
    accelerator = open_accelerator(config.train.mixed_precision)
    torch.manual_seed(config.seed)
    method = Clip(config.output / "tokenizer")
    fit(method, Pairs(method, config), config, accelerator)
    export.publish(method, config.output / "clip", accelerator)


class Pairs:
    """Batches of preprocessed pictures with their captions' token ids."""

    held_out = None

    def __init__(self, method: Clip, config: LoopConfig) -> None:
        pictures, self._captions = wide_world(config.seed, PICTURES)
        # Pictures go through the processor as they will when scores are computed.
        self._pixels = [
            np.asarray(Image.fromarray(p).resize((128, 128), Image.Resampling.BICUBIC))
            for p in pictures
        ]
        self._method, self._config = method, config
        self._each = PICTURES // config.train.batch_size

    def epochs(self, steps: int) -> float:
        return steps / self._each

    def work(self, micro_batches: Any) -> float:
        return 0.0

    def __call__(self, start: int) -> Iterable[list[dict[str, Any]]]:
        for step in range(start, self._config.train.steps):
            yield [self._batch(generator(self._config.seed, "pairs", step))]

    def _batch(self, rng: np.random.Generator) -> dict[str, Any]:
        size = self._config.train.batch_size
        chosen = rng.choice(PICTURES, size=size, replace=False)
        captions = [self._captions[i] for i in chosen]
        pixels = self._method.processor([self._pixels[i] for i in chosen], return_tensors="pt")
        ids = self._method.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        # Equal captions are not each other's negatives.
        same = torch.tensor([[a == b for b in captions] for a in captions])
        return {
            "pixel_values": pixels.pixel_values,
            "input_ids": ids,
            "same": same & ~torch.eye(size, dtype=torch.bool),
            "weight": torch.full((size,), 1 / size),
        }


class Contrast(nn.Module):
    """The symmetric contrastive loss of CLIP (Radford et al. 2021, figure 3) -> losses (B,)."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, batch: dict[str, Any]) -> Tensor:
        output = self.clip(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
        logits = output.logits_per_image.float().masked_fill(batch["same"], float("-inf"))
        labels = torch.arange(len(logits), device=logits.device)
        by_image = functional.cross_entropy(logits, labels, reduction="none")
        by_text = functional.cross_entropy(logits.T, labels, reduction="none")
        return (by_image + by_text) / 2


class Clip:
    """The seam's class for the toy CLIP."""

    def __init__(self, tokenizer_folder: Path) -> None:
        self.tokenizer = build_tokenizer(vocabulary(), tokenizer_folder)
        self.clip, self.processor = build_clip(self.tokenizer)
        self.model = Contrast(self.clip)

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def pipeline(self) -> None:
        return None

    def export(self, directory: Path) -> None:
        self.clip.half().save_pretrained(str(directory))
        self.tokenizer.save_pretrained(str(directory))
        self.processor.save_pretrained(str(directory))


if __name__ == "__main__":
    command(main)
