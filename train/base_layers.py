"""The layers of a base that adapters can be put on, with the shapes of their weights: from its
config.json alone, before any weights are loaded."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from train.config import ModelConfig, UserError
from train.inspection import read_json, settings_of

Layers = dict[str, tuple[int, ...]]
"""By module path, the shape of a layer's weight: (outputs, inputs) or (outputs, inputs, k, k)."""

SD21_UNET: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD21_TEXT_ENCODER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
_ATTENTION = "CrossAttn"
_KNOWN = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}


def of_base(model: ModelConfig) -> dict[str, Layers] | None:
    """The layers of a base's "unet" and "text_encoder". None where only loading it can tell, as of
    a UNet of unusual blocks."""
    try:
        folder = settings_of(model)
    except UserError:
        return None  # what needs it will say so
    settings = {part: _json(folder, part) for part in ("unet", "text_encoder")}
    if not _is_usual(settings["unet"]):
        return None
    return {
        "unet": unet_layers(settings["unet"]),
        "text_encoder": text_layers(settings["text_encoder"]),
    }


def _json(folder: Path, part: str) -> dict[str, Any]:
    return read_json(folder / part / "config.json", f"{part} has no configuration")


def _is_usual(unet: dict[str, Any]) -> bool:
    blocks = {*unet.get("down_block_types", [None]), *unet.get("up_block_types", [None])}
    middle = unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn"
    even = isinstance(unet.get("layers_per_block", 2), int)
    single = unet.get("transformer_layers_per_block") in (None, 1)
    return blocks <= _KNOWN and middle and even and single


def unet_layers(config: dict[str, Any]) -> Layers:
    """Those of diffusers' UNet2DConditionModel: transformers' and resnets'."""
    return _down(config) | _middle(config) | _up(config)


def _down(config: dict[str, Any]) -> Layers:
    found: Layers = {}
    channels = config["block_out_channels"]
    each = config.get("layers_per_block", 2)
    for i, (before, after) in enumerate(pairwise([channels[0], *channels])):
        inputs = [before] + [after] * (each - 1)
        found |= _block(f"down_blocks.{i}", inputs, after, config, config["down_block_types"][i])
    return found


def _middle(config: dict[str, Any]) -> Layers:
    channels = config["block_out_channels"][-1]
    found = _resnet("mid_block.resnets.0", channels, channels)
    found |= _transformer("mid_block.attentions.0", channels, config)
    return found | _resnet("mid_block.resnets.1", channels, channels)


def _up(config: dict[str, Any]) -> Layers:
    """Each resnet sees what comes from below beside the output of a resnet on the way down."""
    found: Layers = {}
    channels = list(reversed(config["block_out_channels"]))
    each = config.get("layers_per_block", 2) + 1
    for i, (below, after) in enumerate(pairwise([channels[0], *channels])):
        beside = [after] * (each - 1) + [channels[min(i + 1, len(channels) - 1)]]
        inputs = [b + s for b, s in zip([below] + [after] * (each - 1), beside, strict=True)]
        found |= _block(f"up_blocks.{i}", inputs, after, config, config["up_block_types"][i])
    return found


def _block(path: str, inputs: list[int], outputs: int, config: dict[str, Any], kind: str) -> Layers:
    found: Layers = {}
    for j, channels in enumerate(inputs):
        if _ATTENTION in kind:
            found |= _transformer(f"{path}.attentions.{j}", outputs, config)
        found |= _resnet(f"{path}.resnets.{j}", channels, outputs)
    return found


def _resnet(path: str, inputs: int, outputs: int) -> Layers:
    found: Layers = {
        f"{path}.conv1": (outputs, inputs, 3, 3),
        f"{path}.conv2": (outputs, outputs, 3, 3),
    }
    if inputs != outputs:
        found[f"{path}.conv_shortcut"] = (outputs, inputs, 1, 1)
    return found


def _transformer(path: str, width: int, config: dict[str, Any]) -> Layers:
    kernel = () if config.get("use_linear_projection", False) else (1, 1)
    block = f"{path}.transformer_blocks.0"
    square = (width, width)
    return {
        f"{path}.proj_in": (*square, *kernel),
        **_attention(f"{block}.attn1", width, width),
        **_attention(f"{block}.attn2", width, config["cross_attention_dim"]),
        f"{block}.ff.net.0.proj": (8 * width, width),  # GEGLU: twice four times as wide
        f"{block}.ff.net.2": (width, 4 * width),
        f"{path}.proj_out": (*square, *kernel),
    }


def _attention(path: str, width: int, context: int) -> Layers:
    return {
        f"{path}.to_q": (width, width),
        f"{path}.to_k": (width, context),
        f"{path}.to_v": (width, context),
        f"{path}.to_out.0": (width, width),
    }


def text_layers(config: dict[str, Any]) -> Layers:
    """Those of CLIP's text encoder."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: Layers = {}
    for i in range(config["num_hidden_layers"]):
        path = f"encoder.layers.{i}"
        found |= {
            f"{path}.self_attn.{name}": (width, width)
            for name in ("k_proj", "v_proj", "q_proj", "out_proj")
        }
        found |= {f"{path}.mlp.fc1": (inner, width), f"{path}.mlp.fc2": (width, inner)}
    return found
