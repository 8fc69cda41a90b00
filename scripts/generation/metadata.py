"""What a picture's file says of how it was made: its settings, and for other programs the
`parameters` text that AUTOMATIC1111's web UI writes and many tools read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.generation import scheduler_settings
from eval.sampling import SCHEDULERS
from scripts.generation.upscaler import FACTOR

if TYPE_CHECKING:
    from scripts.generation.drawing import Drawing, Job

KEY = "parameters"


def settings(
    drawing: Drawing, jobs: Sequence[Job], weights: dict[str, Any]
) -> list[dict[str, Any]]:
    """All that each picture depends on, as JSON: one that is there with the same is kept."""
    factor = FACTOR if drawing.mode == "upscale" else 1
    common = _common(drawing) | {"weights": weights}
    files = {source: source.facts() for source in {job.source for job in jobs} if source}
    return [
        common
        | {"prompt": job.prompt, "seed": job.seed, "size": [factor * side for side in job.size]}
        | (files[job.source] if job.source else {})
        for job in jobs
    ]


def _common(drawing: Drawing) -> dict[str, Any]:
    config, mode = drawing.config, drawing.mode
    always = {
        "mode": mode,
        "model": short(config.model.path),
        "precision": config.precision,
        "steps": config.steps,
        "guidance": config.guidance,
        "scheduler": scheduler_settings(drawing.pipeline),
        "weighting": config.weighting,
    }
    sometimes = {
        "negative_prompt": config.negative_prompt,
        "adapters": [short(adapter) for adapter in config.adapters],
        "controlnets": [short(one) for one in config.controlnet],
        "strength": config.drawn_anew(mode),
        "mask_blur": config.mask_blur if mode == "inpaint" and config.paste_back else None,
        "noise_level": config.noise if mode == "upscale" else None,
        "vae_tiling": config.vae_tiling,
        "attention_slicing": config.attention_slicing,
        "watermark": config.watermark,
    }
    return always | {key: value for key, value in sometimes.items() if value not in (None, "", [])}


def short(path: str) -> str:
    """The end of a path, which says what it is and not where it lies here; a hub id as it is."""
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")


def parameters(picture: dict[str, Any]) -> str:
    """Prompt, negative prompt, and a line of `Name: value` pairs, from a picture's settings."""
    width, height = picture["size"]
    pairs = {
        "Steps": picture["steps"],
        "Sampler": _sampler(picture["scheduler"]),
        "CFG scale": picture["guidance"],
        "Seed": picture["seed"],
        "Size": f"{width}x{height}",
        "Model hash": picture["weights"]["unet"],
        "Model": Path(picture["model"]).stem,
        "Denoising strength": picture.get("strength"),
        "Mask blur": picture.get("mask_blur"),
        "Lora": ", ".join(picture.get("adapters", [])) or None,
        "ControlNet": ", ".join(picture.get("controlnets", [])) or None,
        "Version": "sd-atelier",
    }
    said = ", ".join(
        f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None
    )
    negative = picture.get("negative_prompt")
    lines = [picture["prompt"], *([f"Negative prompt: {negative}"] if negative else []), said]
    return "\n".join(lines)


def _sampler(settings: dict[str, Any]) -> str:
    """The web UIs' name of a scheduler."""
    kind = settings.get("_class_name")
    same = [sampler for sampler in SCHEDULERS.values() if sampler.kind == kind]
    matching = (
        s.title
        for s in sorted(same, key=lambda sampler: -len(sampler.settings))
        if all(settings.get(key) == value for key, value in s.settings.items())
    )
    return next(matching, str(kind).removesuffix("Scheduler"))


def _quoted(value: Any) -> str:
    """A value with commas or colons in quotation marks, as that format has it."""
    text = str(value)
    if not any(sign in text for sign in ",:\n"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
