"""ControlNets: told from their configuration whether they fit a base, and loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ModelConfig, UserError
from train.families import of_width
from train.inspection import from_hub, read_json, settings_of

if TYPE_CHECKING:
    import torch

_WEIGHTS = "diffusion_pytorch_model"
_SHAPE = ("block_out_channels", "layers_per_block")  # of what it adds to the UNet's


@dataclass(frozen=True)
class Control:
    """A ControlNet and how strongly it acts."""

    path: str
    scale: float

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def find(text: str) -> Control:
    """`path` or `path:scale`. Raises UserError for a scale that is no number from 0 to 10."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Control(text, 1.0)
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 10:
        raise UserError(f"controlnet={text}: the scale is a number from 0 to 10, like {head}:0.5")
    return Control(head, scale)


def check(controls: list[Control], model: ModelConfig) -> None:
    """Raises UserError for one that is none, is a pickle, or is of another family than the base,
    from the JSON of both."""
    if not controls:
        return
    unet = read_json(settings_of(model) / "unet" / "config.json", "the UNet has no configuration")
    for control in controls:
        _check(control.path, unet, model.path)


def _check(path: str, unet: dict[str, Any], base: str) -> None:
    settings = read_json(_folder(path) / "config.json", f"controlnet={path} is no ControlNet?")
    name = settings.get("_class_name")
    if name != "ControlNetModel":
        raise UserError(f"controlnet={path} is a {name}, and no ControlNetModel of diffusers")
    ours, theirs = unet.get("cross_attention_dim"), settings.get("cross_attention_dim")
    if ours != theirs:
        raise UserError(
            f"controlnet={path} is of {of_width(theirs)}, the base {base} of {of_width(ours)}: "
            "take one that was trained for the base's family"
        )
    for key in _SHAPE:
        if unet.get(key) != settings.get(key):
            raise UserError(
                f"controlnet={path} has {key}={settings.get(key)}, the UNet of {base} "
                f"{unet.get(key)}: it was made for another model"
            )


def _folder(path: str) -> Path:
    """Where its JSON is; of a local folder also its weights are looked for."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
            raise UserError(
                f"controlnet={path}: no such folder. Give the folder of a ControlNet in diffusers' "
                "format (config.json and safetensors), or a hub id"
            )
        return from_hub(path, None, ["config.json"], key="controlnet")
    if not any(folder.glob(f"{_WEIGHTS}*.safetensors")):
        pickles = " (pickles can run code when loaded and are refused)"
        why = pickles if any(folder.glob("*.bin")) else ""
        raise UserError(f"controlnet={path} has no {_WEIGHTS}.safetensors{why}")
    return folder


def load(controls: list[Control], dtype: torch.dtype) -> list[Any]:
    """The models, in that precision. Raises UserError where they cannot be had."""
    import diffusers

    models = []
    for control in controls:
        try:
            model = diffusers.ControlNetModel.from_pretrained(
                control.path, use_safetensors=True, torch_dtype=dtype
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"controlnet={control.path} could not be loaded: {reason}") from None
        models.append(model.eval())
    return models
