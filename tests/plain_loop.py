"""A plain training loop, as the published example scripts have it, to hold the project's runs
against: nothing cached, torch's global randomness, diffusers' own scheduler for noise and targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch.nn import functional


@dataclass
class Data:
    """Pictures (n, 3, H, W) in [-1, 1] and their captions."""

    pixels: torch.Tensor
    captions: list[str]


def read(folder: Path) -> Data:
    files = sorted(folder.glob("*.png"))
    pixels = [np.asarray(Image.open(f).convert("RGB"), np.float32) / 127.5 - 1 for f in files]
    captions = [f.with_suffix(".txt").read_text().strip() for f in files]
    return Data(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), captions)


def embed(pipeline: Any, captions: Sequence[str]) -> torch.Tensor:
    ids = pipeline.tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids
    return pipeline.text_encoder(ids)[0]


def losses(
    pipeline: Any,
    latents: torch.Tensor,
    captions: Sequence[str],
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Squared errors (B,) of v."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    text = embed(pipeline, captions)
    prediction = pipeline.unet(noisy, timesteps, encoder_hidden_states=text).sample
    return functional.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))


def encode(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor


def train(
    pipeline: Any,
    parameters: list[torch.nn.Parameter],
    data: Data,
    *,
    steps: int,
    batch: int,
    rate: float,
    dropout: float = 0.1,
    weight_decay: float = 0.01,
    class_data: Data | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """`batch` pictures per step, cosine to 1 % of `rate`; with class pictures, as many of those
    again, whose mean loss is added."""
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (
                0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))
            )
        loss = torch.zeros(())
        for part in (data, class_data):
            if part is not None:
                loss = loss + _drawn(pipeline, part, batch, dropout).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def _drawn(pipeline: Any, data: Data, batch: int, dropout: float) -> torch.Tensor:
    chosen = torch.randperm(len(data.pixels))[:batch]
    latents = encode(pipeline, data.pixels[chosen])
    captions = ["" if torch.rand(()) < dropout else data.captions[i] for i in chosen]
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(chosen),))
    return losses(pipeline, latents, captions, noise, timesteps)


@torch.no_grad()
def held_out(pipeline: Any, data: Data, *, rounds: int = 8) -> torch.Tensor:
    """The loss of each picture (n,) at noise and timesteps that are always the same."""
    torch.manual_seed(99)
    latents = encode(pipeline, data.pixels)
    total = torch.zeros(len(latents))
    for k in range(rounds):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(k * 1000 // rounds, (k + 1) * 1000 // rounds, (len(latents),))
        total += losses(pipeline, latents, data.captions, noise, timesteps)
    return total / rounds


def halve(file: Path) -> None:
    """The picture at half its size, in place."""
    with Image.open(file) as picture:
        small = picture.reduce(2)
    small.save(file)


@torch.no_grad()
def add_token(pipeline: Any, token: str, words: str) -> int:
    """A new word with the mean embedding of others; returns its row."""
    pipeline.tokenizer.add_tokens([token])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    weight = pipeline.text_encoder.get_input_embeddings().weight
    ids = pipeline.tokenizer(words, add_special_tokens=False).input_ids
    row = pipeline.tokenizer.convert_tokens_to_ids(token)
    weight[row] = weight[ids].mean(0)
    return int(row)
