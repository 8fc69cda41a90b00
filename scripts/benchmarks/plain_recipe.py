"""A training step as published example scripts take it: everything in it, one after the other.

What a step does here and not in the loop of this project: the VAE and the text encoder encode each
picture and caption anew, pictures are decoded and prepared in the training process, the loss is
read from the device at every step, and so is what the noise schedule needs. The optimizer is as
torch makes it by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class Folder(Dataset[dict[str, Tensor]]):
    """Pictures and captions of a folder, decoded when asked for."""

    def __init__(self, folder: Path, tokenizer: Any, side: int) -> None:
        self.files, self.side = sorted(folder.glob("*.png")), side
        self.captions = [
            f.with_suffix(".txt").read_text(encoding="utf-8").strip() for f in self.files
        ]
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self.files[index]) as file:
            picture = file.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)
        text = self.tokenizer(
            self.captions[index],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"pixels": pixels, "input_ids": text.input_ids[0]}


def losses(
    pipeline: Any,
    folder: Path,
    accelerator: Any,
    parameters: list[nn.Parameter],
    *,
    batch: int,
    side: int,
) -> Iterator[float]:
    """Takes a step each time it is asked for the next loss, of what `parameters` are trained in the
    pipeline's UNet."""
    from diffusers import DDPMScheduler

    loader = DataLoader(
        Folder(folder, pipeline.tokenizer, side), batch, shuffle=True, drop_last=True, num_workers=0
    )
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=1e-2)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10**6)
    while True:
        for samples in loader:
            moved = {name: tensor.to(accelerator.device) for name, tensor in samples.items()}
            with accelerator.autocast():
                loss = _loss(pipeline, scheduler, moved)
            mean = accelerator.gather(loss.detach().repeat(batch)).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            yield mean.item()


def _loss(pipeline: Any, scheduler: Any, samples: dict[str, Tensor]) -> Tensor:
    vae, dtype = pipeline.vae, pipeline.vae.dtype
    with torch.no_grad():
        latents = vae.encode(samples["pixels"].to(dtype)).latent_dist.sample()
        text = pipeline.text_encoder(samples["input_ids"])[0]
    latents = latents * vae.config.scaling_factor  # (B, 4, H/8, W/8)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, len(scheduler), (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    prediction = pipeline.unet(noisy, timesteps, encoder_hidden_states=text).sample
    return functional.mse_loss(prediction.float(), target.float())
