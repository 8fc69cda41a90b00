"""Pictures during training: fixed prompts, one seed per picture, beside the base model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from train.config import PreviewConfig
from train.method import Method


class Previews:
    """Renders on the main process. Picture k depends on its prompt and `seed + k` alone."""

    def __init__(self, folder: Path, config: PreviewConfig, accelerator: Accelerator) -> None:
        self._folder, self._config, self._accelerator = folder, config, accelerator
        self._active = bool(config.every and config.prompts)

    def base(self, method: Method) -> None:
        """The untrained model's pictures, once, before the first step."""
        if not self._path("base").exists():
            self._write(method, "base")

    def render(self, method: Method, step: int) -> None:
        """The pictures after `step` steps, and grid.png: base above, trained below."""
        self._write(method, f"step-{step:08d}")

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _write(self, method: Method, name: str) -> None:
        if self._active and self._accelerator.is_main_process:
            pictures = self._generate(method)
            folder = self._path(name)
            folder.mkdir(parents=True, exist_ok=True)
            for k, picture in enumerate(pictures):
                picture.save(folder / f"{k:02d}.png")
            if name != "base":
                grid([self._base_pictures(len(pictures)), pictures]).save(folder / "grid.png")
        if self._active:
            self._accelerator.wait_for_everyone()

    def _base_pictures(self, count: int) -> list[Image.Image]:
        return [Image.open(self._path("base") / f"{k:02d}.png") for k in range(count)]

    @torch.no_grad()
    def _generate(self, method: Method) -> list[Image.Image]:
        pipeline = method.pipeline()
        if pipeline is None:
            return []
        training = [m for m in method.model.modules() if m.training]
        method.model.eval()
        with self._accelerator.autocast():
            pictures = [self._picture(pipeline, k) for k in range(len(self._config.prompts))]
        for module in training:
            module.training = True
        return pictures

    def _picture(self, pipeline: Any, k: int) -> Image.Image:
        config = self._config
        # A generator on the CPU: the same picture on every kind of device.
        generator = torch.Generator("cpu").manual_seed(config.seed + k)
        result = pipeline(
            config.prompts[k],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=generator,
            width=config.resolution,
            height=config.resolution,
        )
        return result.images[0]


def grid(rows: list[list[Image.Image]], gap: int = 4) -> Image.Image:
    """Rows of equally large pictures on white."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white"
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), y * (height + gap)))
    return sheet
