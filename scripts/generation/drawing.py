"""From jobs to pixels: what a pipeline is called with in each mode, and what is done with what it
returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data.maps import DOWN
from eval.generation import finite_uint8
from scripts.generation.config import GenerateConfig, Mode
from scripts.generation.inputs import Source, pasted, scaled

if TYPE_CHECKING:
    import torch

    from scripts.generation.depth import Estimator
    from scripts.generation.encoding import Encoder

_KEPT = 8  # decoded pictures that are likely to be wanted again


@dataclass(frozen=True)
class Job:
    """One picture: `source` is None where prompt and size are all that it is made from."""

    prompt: str
    seed: int
    size: tuple[int, int]
    source: Source | None = None


@dataclass
class Drawing:
    """Makes the pixels of jobs, a batch of equal size and length of prompt at a time."""

    pipeline: Any
    encoder: Encoder
    config: GenerateConfig
    mode: Mode
    scales: list[float] = field(default_factory=list)
    """How strongly each ControlNet acts."""
    estimator: Estimator | None = None

    def __post_init__(self) -> None:
        self._picture = lru_cache(_KEPT)(Source.pixels)
        self._mask = lru_cache(_KEPT)(Source.repainted)
        self._control = lru_cache(_KEPT)(Source.control)
        self._depth = lru_cache(_KEPT)(self._depth_of)

    def key(self, job: Job) -> tuple[int, ...]:
        """What the jobs of a batch have in common."""
        return (*job.size, self._windows(job.prompt))

    def sample(self, jobs: Sequence[Job]) -> np.ndarray:
        """Pixels uint8 (B, H, W, 3). Raises NotFinite.

        How many pictures are in a batch moves values by rounding. On a CPU, where a batch saves
        next to nothing at real sizes, they are made one by one and are the same to the bit.
        """
        if self.pipeline._execution_device.type == "cpu":
            return np.concatenate([self._sample([job]) for job in jobs])
        return self._sample(jobs)

    def _sample(self, jobs: Sequence[Job]) -> np.ndarray:
        import torch

        images = self.pipeline(
            **self._prompts(jobs),
            **self._pictures(jobs),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
            output_type="np",
        ).images  # (B, H, W, 3)
        made = finite_uint8(images, [(job.prompt, job.seed) for job in jobs])
        return np.stack([self._finished(*pair) for pair in zip(made, jobs, strict=True)])

    def _windows(self, prompt: str) -> int:
        return max(map(self.encoder.windows, (prompt, self.config.negative_prompt)))

    def _prompts(self, jobs: Sequence[Job]) -> dict[str, torch.Tensor]:
        import torch

        windows = self._windows(jobs[0].prompt)
        wanted = torch.cat([self.encoder.encode(job.prompt, windows) for job in jobs])
        unwanted = self.encoder.encode(self.config.negative_prompt, windows)
        return {
            "prompt_embeds": wanted,
            "negative_prompt_embeds": unwanted.expand(len(jobs), -1, -1),
        }

    def _pictures(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """What the mode's pipeline takes beside prompts."""
        given: dict[str, Any] = {}
        if self.mode in ("txt2img", "inpaint"):
            given["width"], given["height"] = jobs[0].size
        if self.mode != "txt2img":
            given["image"] = _stacked([self._picture(source_of(job)) for job in jobs])
        if (strength := self.config.drawn_anew(self.mode)) is not None:
            given["strength"] = strength
        if self.mode == "inpaint":
            masks = [self._mask(source_of(job))[..., None] for job in jobs]
            given["mask_image"] = _stacked(masks)
        elif self.mode == "depth2img":
            given["depth_map"] = _tensor(np.stack([self._depth(source_of(job)) for job in jobs]))
        elif self.mode == "upscale":
            given["noise_level"] = self.config.noise
        return given | (self._controls(jobs) if self.scales else {})

    def _controls(self, jobs: Sequence[Job]) -> dict[str, Any]:
        maps = [
            _stacked([self._control(source_of(job), number) for job in jobs])
            for number in range(len(self.scales))
        ]
        several = len(maps) > 1
        return {
            "image" if self.mode == "txt2img" else "control_image": maps if several else maps[0],
            "controlnet_conditioning_scale": self.scales if several else self.scales[0],
        }

    def _depth_of(self, source: Source) -> np.ndarray:
        if source.depth is not None:
            return source.depth_map()
        assert self.estimator is not None
        seen = self.estimator.estimate(self._picture(source))
        small = (source.size[0] // DOWN, source.size[1] // DOWN)
        return scaled(_resized(seen, small), f"the depth estimated of image={source.image}")

    def _finished(self, pixels: np.ndarray, job: Job) -> np.ndarray:
        if self.mode == "inpaint" and self.config.paste_back:
            source = source_of(job)
            original, mask = self._picture(source), self._mask(source)
            pixels = pasted(pixels, original, mask, self.config.mask_blur)
        if self.config.watermark is not None:
            from eval.watermark import embed

            pixels = embed(pixels, self.config.watermark.encode())
        return pixels


def source_of(job: Job) -> Source:
    """That of a job which has one."""
    assert job.source is not None
    return job.source


def _stacked(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, C) each to float32 (B, C, H, W) in [0, 1]."""
    return _tensor(np.stack(pictures).astype(np.float32) / 255).permute(0, 3, 1, 2)


def _resized(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 (h, w) at the size (width, height), as diffusers resizes it."""
    from torch.nn.functional import interpolate

    planes = _tensor(depth.astype(np.float32))[None, None]
    return interpolate(planes, size=size[::-1], mode="bicubic", align_corners=False)[0, 0].numpy()


def _tensor(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(values)
