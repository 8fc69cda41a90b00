"""Stable Diffusion 2.x as a single file in the LDM layout, from a diffusers folder. For tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]

_UNET_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_VAE = (
    *((f"mid_block.resnets.{index}", f"mid.block_{index + 1}") for index in range(2)),
    *((f"up_blocks.{index}.", f"up.{3 - index}.") for index in range(4)),
    ("down_blocks.", "down."),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    *((f"to_{letter}.", f"{letter}.") for letter in "qkv"),
    ("to_out.0", "proj_out"),
)
_OPEN_CLIP = (
    ("embeddings.token_embedding.weight", "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers", "transformer.resblocks"),
    ("layer_norm", "ln_"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    ("self_attn", "attn"),
    ("q_proj.", "in_proj_"),
)


def to_ldm(folder: Path) -> Weights:
    """The weights of a diffusers folder under the names of Stable Diffusion 2's own files, in the
    folder's precision. The folder's VAE must have four blocks, as SD's has."""
    parts = {
        "model.diffusion_model.": _unet(folder),
        "first_stage_model.": _vae(_weights(folder, "vae")),
        "cond_stage_model.model.": _open_clip(_weights(folder, "text_encoder")),
    }
    return {
        prefix + name: tensor.contiguous()
        for prefix, weights in parts.items()
        for name, tensor in weights.items()
    }


def _weights(folder: Path, part: str) -> Weights:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _unet(folder: Path) -> Weights:
    weights = _weights(folder, "unet")
    layers = json.loads((folder / "unet/config.json").read_text())["layers_per_block"]
    return {_unet_name(name, weights, layers): tensor for name, tensor in weights.items()}


def _unet_name(name: str, weights: Weights, layers: int) -> str:
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", name)
    if match is None:
        return _rename(name, _UNET_ENDS)
    side, block, kind, index, rest = match.groups()
    place, attention = (layers + 1) * int(block or 0) + int(index), int(kind == "attentions")
    rest = _rename(rest, _RESNET) if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * int(index) + attention}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{place + layers + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        attends = f"up_blocks.{block}.attentions.0.norm.weight" in weights
        return f"output_blocks.{place + layers}.{1 + attends}.{rest}"
    if side == "down":
        return f"input_blocks.{place + 1}.{attention}.{rest}"
    return f"output_blocks.{place}.{attention}.{rest}"


def _vae(weights: Weights) -> Weights:
    """LDM's attention is made of 1x1 convolutions."""
    renamed = {_rename(name, _VAE): tensor for name, tensor in weights.items()}
    return {
        name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def _open_clip(weights: Weights) -> Weights:
    """OpenCLIP's file also holds what SD 2 does not use: the last layer (here a copy of the one
    before), the projection and the logit scale."""
    weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
    for name, tensor in list(weights.items()):
        if name.startswith(f"encoder.layers.{last}."):
            weights[name.replace(f".{last}.", f".{last + 1}.", 1)] = tensor.clone()
    for name in [name for name in weights if ".q_proj." in name]:
        q, k, v = (weights.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv")
        weights[name] = torch.cat([q, k, v])
    renamed = {_rename(name, _OPEN_CLIP): tensor for name, tensor in weights.items()}
    scale = renamed["ln_final.weight"]
    unused = {"text_projection": torch.eye(len(scale), dtype=scale.dtype), "logit_scale": scale[0]}
    return renamed | {name: tensor.clone() for name, tensor in unused.items()}
