"""Pictures during training: fixed prompts, one seed per picture, beside the base model's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from data.images import open_image
from data.maps import open_depth, open_mask
from train import resting, screens, stopping
from train.config import PreviewConfig
from train.course import forget, named
from train.families import Family, family_of
from train.guards import is_out_of_memory
from train.method import Method


class Previews:
    """Renders on the main process. Picture k depends on its prompt and `seed + k` alone."""

    def __init__(
        self, folder: Path, config: PreviewConfig, accelerator: Accelerator, *, start: int
    ) -> None:
        """start: the step that a run is resumed at. What was shown of later ones is forgotten."""
        self._folder, self._config, self._accelerator = folder, config, accelerator
        self._active = bool(config.every and config.prompts)
        if accelerator.is_main_process and start:
            forget(folder, start)

    def base(self, method: Method) -> None:
        """The untrained model's pictures, and none else: at step 0 nothing binds a run to what was
        shown before, perhaps of another base."""
        if self._accelerator.is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._write(method, "base", stopping.check)

    def render(self, method: Method, step: int, check: Callable[[], None] = stopping.check) -> bool:
        """The pictures after `step` steps, and grid.png: base above, trained below. Where `check`
        raises Interrupted, before any of them, there are none. Returns whether this process has
        made them now."""
        return self._write(method, named(step), check)

    def shown(self, step: int) -> list[dict[str, Any]]:
        """What is there to be seen of a step, on the main process: each prompt with its seed and
        the paths of its picture and, if there is one, the base's."""
        prompts = self._config.prompts if self._active else []
        found = []
        for k, prompt in enumerate(prompts):
            picture, base = (self._path(n) / f"{k:02d}.png" for n in (named(step), "base"))
            if picture.exists():
                beside = str(base.absolute()) if base.exists() else None
                where = {"picture": str(picture.absolute()), "base": beside}
                found.append({"prompt": prompt, "seed": self._config.seed + k, **where})
        return found

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _write(self, method: Method, name: str, check: Callable[[], None]) -> bool:
        made = False
        if not self._active:
            return made
        # Only the main process may look: the others would see what it has just written.
        if self._accelerator.is_main_process and not self._path(name).exists():
            # Whoever was asked to end goes on to where all processes find that out.
            with suppress(stopping.Interrupted), _costing_no_run(name):
                self._save(self._generate(method, check), name)
                made = True
        self._accelerator.wait_for_everyone()
        return made

    def _save(self, pictures: list[Image.Image], name: str) -> None:
        temporary = self._path(f".writing-{name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for k, picture in enumerate(pictures):
            picture.save(temporary / f"{k:02d}.png")
        if name != "base" and pictures:
            grid([*self._base_row(len(pictures)), pictures]).save(temporary / "grid.png")
        os.replace(temporary, self._path(name))

    def _base_row(self, count: int) -> list[list[Image.Image]]:
        """The base's pictures as one row, or none where previews were asked for only later."""
        paths = [self._path("base") / f"{k:02d}.png" for k in range(count)]
        return [[Image.open(path) for path in paths]] if all(p.exists() for p in paths) else []

    @torch.no_grad()
    def _generate(self, method: Method, check: Callable[[], None]) -> list[Image.Image]:
        pipeline = method.pipeline()
        if pipeline is None:
            return []
        device = self._accelerator.device
        with resting.awake(pipeline, device), at_rest(method.model), self._accelerator.autocast():
            pictures = []
            count = len(self._config.prompts)
            for k in screens.track(range(count), "previews", total=count, unit="pictures"):
                check()
                pictures.append(self._picture(pipeline, k))
            return pictures

    def _picture(self, pipeline: Any, k: int) -> Image.Image:
        config = self._config
        side = config.resolution
        assert side is not None
        size: dict[str, Any] = {"width": side, "height": side}
        if config.images:
            size = beside(family_of(pipeline), config.images[k], side)
        # A generator on the CPU: the same picture on every kind of device.
        generator = torch.Generator("cpu").manual_seed(config.seed + k)
        result = pipeline(
            config.prompts[k],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=generator,
            **size,
        )
        return result.images[0]


@contextmanager
def _costing_no_run(name: str) -> Iterator[None]:
    """Where memory does not suffice for pictures there are none."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0]
        tqdm.write(
            f"warning: no previews of {name}, out of memory: {first} A smaller preview.resolution "
            "needs less; preview.every=0 does without"
        )
    else:
        return
    clear_device_cache(garbage_collection=True)  # once the error, which holds on to it, is gone


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model as a user would load it: without dropout, and with nothing that requires gradients.

    Whether a weight does decides, on a CPU even under `no_grad`, which kernel multiplies, and so
    the last bit: pictures of the exported weights would differ from the previews.
    """
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


def beside(family: Family, picture: Path, side: int) -> dict[str, Any]:
    """What a depth or inpainting pipeline is called with beside a prompt, for pictures of `side` x
    `side` pixels: the picture and its NAME.depth.png, all of it to be drawn anew, or its
    NAME.mask.png, to be painted where that is white."""
    image = square(open_image(picture), side, Image.Resampling.LANCZOS)
    companion = picture.with_suffix(family.companion)
    if family.depth:
        # At the size of the latents already, where diffusers would resize without a filter.
        depth = square(open_depth(companion), side // 8, Image.Resampling.BICUBIC)
        return {
            "image": image,
            "depth_map": torch.from_numpy(np.array(depth))[None],
            "strength": 1.0,
        }
    mask = square(open_mask(companion), side, Image.Resampling.BOX)
    return {"image": image, "mask_image": mask, "width": side, "height": side}


def square(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """The middle of a picture at `side` x `side` pixels."""
    return ImageOps.fit(image, (side, side), resample)


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
