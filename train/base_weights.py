"""The weights of a whole model's UNet and text encoder, each read when it is asked for, so that
models are compared in the memory of their largest layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.config import ModelConfig, UserError
from train.inspection import inspect, settings_of
from train.stored_tensors import Stored


@dataclass(frozen=True)
class Weights:
    """By diffusers' names, as `kohya.path_of` spells them: `unet.conv_in`."""

    layers: dict[str, Stored]
    """Of linear layers and convolutions, the weights: what an adapter can change."""
    rest: dict[str, Stored]
    """Biases, norms and embeddings, by the names of their tensors."""
    prediction_type: str
    """What the model predicts: "epsilon", "v_prediction"..."""


def of_model(model: ModelConfig, key: str) -> Weights:
    """The weights of a diffusers folder or a single file.

    key: what the user calls it in a `UserError`, like "base", for what is no such model.
    """
    from train import ldm

    path = Path(model.path)
    if not path.exists():
        raise UserError(
            f"{key}={path}: no such folder or file. Give a diffusers folder or a .safetensors "
            "file; a model of the hub is to be downloaded first"
        )
    try:
        base = inspect(model)
        by_part = (
            ldm.parts_of_folder(path)
            if path.is_dir()
            else ldm.parts_of_file(path, settings_of(model))
        )
    except UserError as error:
        raise UserError(str(error).replace("model.path=", f"{key}=")) from None
    named = _named(by_part)
    layers = {n.removesuffix(".weight"): t for n, t in named.items() if _is_layer(n, t)}
    rest = {n: t for n, t in named.items() if not _is_layer(n, t)}
    return Weights(layers, rest, base.prediction_type)


def _named(by_part: dict[str, dict[str, Stored]]) -> dict[str, Stored]:
    within = {"unet": "unet", "text_encoder": "text_encoder.text_model"}
    return {
        f"{path}.{name}": stored
        for part, path in within.items()
        for name, stored in by_part[part].items()
    }


def _is_layer(name: str, stored: Stored) -> bool:
    return name.endswith(".weight") and len(stored.shape) > 1 and ".embeddings." not in name
