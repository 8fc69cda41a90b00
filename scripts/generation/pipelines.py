"""The pipeline of a mode, made of a base's parts, and what it takes to fit a small GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.generation import weights
from scripts.generation import control, depth, upscaler
from scripts.generation.config import GenerateConfig, Mode
from train import adapter_file, new_tokens
from train.adapter_file import Adapter
from train.config import UserError
from train.families import BaseModel
from train.inspection import inspect

if TYPE_CHECKING:
    from scripts.generation.control import Control

_KINDS = {
    ("txt2img", False): "StableDiffusionPipeline",
    ("img2img", False): "StableDiffusionImg2ImgPipeline",
    ("inpaint", False): "StableDiffusionInpaintPipeline",
    ("txt2img", True): "StableDiffusionControlNetPipeline",
    ("img2img", True): "StableDiffusionControlNetImg2ImgPipeline",
    ("inpaint", True): "StableDiffusionControlNetInpaintPipeline",
}
_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def recognise(config: GenerateConfig) -> BaseModel | None:
    """What the base is, from its JSON; None for the x4 upscaler. Raises UserError."""
    return None if upscaler.is_upscaler(config.model) else inspect(config.model)


def check(
    config: GenerateConfig,
    mode: Mode,
    base: BaseModel | None,
    adapters: list[Adapter],
    controls: list[Control],
) -> None:
    """Raises UserError for what does not fit the base, as far as headers and JSON tell."""
    prediction = base.prediction_type if base else upscaler.prediction_type(config.model)
    adapter_file.check_prediction(adapters, prediction)
    folder = Path(config.model.path)
    if folder.is_dir():
        words = new_tokens.words_of(folder / "tokenizer")
        adapter_file.check(adapters, adapter_file.folder_shapes(folder), words)
    control.check(controls, config.model)
    if mode == "upscale":
        upscaler.check_noise(config.model, config.noise)
    if mode == "depth2img" and config.depth is None:
        depth.check(config.model)


def apply(pipeline: Any, adapters: list[Adapter]) -> None:
    """Loads the adapters, checked once more against what was loaded."""
    words = pipeline.tokenizer.get_vocab()
    adapter_file.check(adapters, adapter_file.pipeline_shapes(pipeline), words)
    adapter_file.apply(pipeline, adapters)


def of_mode(pipeline: Any, mode: Mode, controls: list[Any]) -> Any:
    """The pipeline of the mode on the same parts."""
    import diffusers

    if (mode, bool(controls)) not in _KINDS:
        return pipeline
    kind = getattr(diffusers, _KINDS[mode, bool(controls)])
    if type(pipeline) is kind:
        return pipeline
    if not isinstance(pipeline.unet.config.sample_size, int):
        pipeline.unet.register_to_config(sample_size=64)  # which their constructors compare
    parts: dict[str, Any] = {part: getattr(pipeline, part) for part in _PARTS}
    if controls:
        parts["controlnet"] = controls[0] if len(controls) == 1 else controls
    parts |= {"safety_checker": None, "feature_extractor": None}
    made = kind(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def fingerprints(pipeline: Any, controls: list[Any]) -> dict[str, Any]:
    """Of all weights, while they are where they can be read."""
    from train.models import fingerprint

    found: dict[str, Any] = dict(weights(pipeline))
    return found | ({"controlnets": [fingerprint(model) for model in controls]} if controls else {})


def place(pipeline: Any, config: GenerateConfig, device: Any) -> Any:
    """The pipeline ready to run on the device, with what saves memory."""
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    if config.vae_slicing:
        pipeline.vae.enable_slicing()
    if config.attention_slicing:
        pipeline.enable_attention_slicing()
    if config.offload == "no":
        return pipeline.to(device)
    if str(device) == "cpu":
        raise UserError(
            f"offload={config.offload} moves parts to a GPU while they are used, and there is "
            "none here: leave it out"
        )
    if config.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
    return pipeline
