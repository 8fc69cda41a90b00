"""The names of Stable Diffusion's tensors in the layout of its authors' code (LDM).

The layout (github.com/Stability-AI/stablediffusion, ldm/) numbers the UNet's blocks through, with
one resnet (and its attention) or one down- or upsampler in each, counts the VAE's blocks on the way
up from the last, and has SD 2's text encoder as OpenCLIP has it, with q, k and v in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

UNET = "model.diffusion_model."
VAE = "first_stage_model."
OPEN_CLIP = "cond_stage_model.model."
CLIP = "cond_stage_model.transformer."
DEPTH = "depth_model."

Place = tuple[str, int | None]
"""A name in the layout and, of q, k and v, which third of its rows."""

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_ENDS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ENDS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
}
# The VAE's attention in folders of early diffusers, as the published ones of SD 1 and 2 are.
_EARLY_ENDS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_REST = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def places(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Callable[[str], Place]]:
    """By part ("unet", "vae", "text_encoder"), what finds the place of one of its tensors.

    unet, vae: their config.json. The UNet's tells SD 2, whose text encoder is OpenCLIP's.
    """
    blocks = len(vae["block_out_channels"])
    second = bool(unet.get("use_linear_projection"))
    return {
        "unet": lambda name: (UNET + unet_name(name, unet), None),
        "vae": lambda name: (VAE + vae_name(name, blocks), None),
        "text_encoder": open_clip_place if second else lambda n: (f"{CLIP}text_model.{n}", None),
    }


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """A UNet's tensor in the layout, without its prefix. config: unet/config.json."""
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", name)
    if match is None:
        return _with_end(name, _UNET_ENDS)
    side, block, kind, index, rest = match.groups()
    if kind == "resnets":
        rest = _with_end(rest, _RESNET_ENDS)
    if side == "mid":
        return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{rest}"
    each = config.get("layers_per_block", 2) + 1
    if side == "down":
        return _down(kind, each * int(block) + int(index), each, rest)
    attends = "CrossAttn" in config["up_block_types"][int(block)]
    return _up(kind, each * int(block) + int(index), each, rest, attends=attends)


def _down(kind: str, place: int, each: int, rest: str) -> str:
    if kind == "downsamplers":
        return f"input_blocks.{place + each}.0.{rest.replace('conv', 'op')}"
    return f"input_blocks.{place + 1}.{int(kind == 'attentions')}.{rest}"


def _up(kind: str, place: int, each: int, rest: str, *, attends: bool) -> str:
    """An upsampler comes after the last resnet of its block, and its attention."""
    if kind == "upsamplers":
        return f"output_blocks.{place + each - 1}.{1 + attends}.{rest}"
    return f"output_blocks.{place}.{int(kind == 'attentions')}.{rest}"


def vae_name(name: str, blocks: int) -> str:
    """A VAE's tensor in the layout, without its prefix. blocks: of its decoder."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
    for old, new in (
        ("mid_block.attentions.0", "mid.attn_1"),
        ("down_blocks.", "down."),
        (".resnets.", ".block."),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
    ):
        name = name.replace(old, new)
    return _with_end(name, _VAE_ENDS)


def open_clip_place(name: str) -> Place:
    """A tensor of SD 2's text encoder in the layout."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return OPEN_CLIP + _CLIP_REST[name], None
    layer, module, end = match.groups()
    path = f"{OPEN_CLIP}transformer.resblocks.{layer}."
    if qkv := re.fullmatch(r"self_attn\.([qkv])_proj", module):
        return f"{path}attn.in_proj_{end}", "qkv".index(qkv[1])
    return f"{path}{_CLIP_LAYER[module]}.{end}", None


def todays(part: str, name: str) -> str:
    """What diffusers and transformers call a tensor today that an older folder may have under
    another name."""
    return _with_end(name, _EARLY_ENDS) if part == "vae" else name.removeprefix("text_model.")


def _with_end(name: str, ends: Mapping[str, str]) -> str:
    """With the end of a module's path replaced, where the table has it."""
    path, _, kind = name.rpartition(".")
    for old, new in ends.items():
        if path == old or path.endswith(f".{old}"):
            return f"{path.removesuffix(old)}{new}.{kind}"
    return name
