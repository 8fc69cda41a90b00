"""The x4 upscaler of Stable Diffusion 2: recognised, and loaded part by part as what they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ModelConfig, UserError
from train.inspection import read_json, settings_of

if TYPE_CHECKING:
    import torch

FACTOR = 4
_MOST_NOISE = 350  # as diffusers takes it where model_index.json does not say
_NAME = "StableDiffusionUpscalePipeline"
_HUB = re.compile(r"[A-Za-z0-9][\w-]*/[\w.-]+")


def is_upscaler(model: ModelConfig) -> bool:
    """Whether a folder or hub model says that it is the x4 upscaler."""
    path = Path(model.path)
    local = path.is_dir()
    if not local and (path.exists() or path.suffix or not _HUB.fullmatch(model.path)):
        return False
    if local and not (path / "model_index.json").is_file():
        return False
    return _index(model).get("_class_name") == _NAME


def _index(model: ModelConfig) -> dict[str, Any]:
    return read_json(settings_of(model) / "model_index.json", "not a diffusers folder?")


def prediction_type(model: ModelConfig) -> str:
    """What its UNet predicts."""
    return str(_scheduler(model).get("prediction_type", "epsilon"))


def timesteps(model: ModelConfig) -> int:
    """At how many it was trained."""
    return int(_scheduler(model).get("num_train_timesteps", 1000))


def check_noise(model: ModelConfig, level: int) -> None:
    """Raises UserError for more noise than it was trained with."""
    most = int(_index(model).get("max_noise_level", _MOST_NOISE))
    unet = settings_of(model) / "unet" / "config.json"
    classes = read_json(unet, "the UNet has no configuration").get("num_class_embeds")
    most = most if classes is None else min(most, int(classes) - 1)
    if level > most:
        raise UserError(
            f"noise_level={level} is more than model.path={model.path} takes: give at most {most}"
        )


def _scheduler(model: ModelConfig) -> dict[str, Any]:
    file = settings_of(model) / "scheduler" / "scheduler_config.json"
    return read_json(file, "the scheduler has no configuration")


def load(model: ModelConfig, dtype: torch.dtype) -> Any:
    """Its pipeline on the CPU, without safety checker and watermarker.

    Whatever model_index.json may say, a UNet is a UNet here, and safetensors only are read. Raises
    UserError where a part cannot be had.
    """
    import diffusers
    import transformers

    name = str(_scheduler(model).get("_class_name"))
    if not re.fullmatch(r"[A-Za-z0-9]+Scheduler", name) or not hasattr(diffusers, name):
        raise UserError(f"model.path={model.path}: {name} is no scheduler of diffusers")
    where = {"revision": model.revision}
    weights = {"use_safetensors": True, **where}

    def part(kind: Any, folder: str, **options: Any) -> Any:
        return kind.from_pretrained(model.path, subfolder=folder, **options)

    try:
        pipeline: Any = diffusers.StableDiffusionUpscalePipeline(
            vae=part(diffusers.AutoencoderKL, "vae", torch_dtype=dtype, **weights),
            text_encoder=part(transformers.CLIPTextModel, "text_encoder", dtype=dtype, **weights),
            tokenizer=part(transformers.CLIPTokenizer, "tokenizer", **where),
            unet=part(diffusers.UNet2DConditionModel, "unet", torch_dtype=dtype, **weights),
            low_res_scheduler=part(diffusers.DDPMScheduler, "low_res_scheduler", **where),
            scheduler=part(getattr(diffusers, name), "scheduler", **where),
            max_noise_level=int(_index(model).get("max_noise_level", _MOST_NOISE)),
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path={model.path} could not be loaded: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
