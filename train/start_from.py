"""lora.start_from: an adapter that a run goes on from, in diffusers' format or kohya's.

Whether it fits is told from its header; nothing is loaded before that.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from train import adapter_file, adapter_settings
from train.config import UserError
from train.safetensors_file import Entry, read_bytes, read_header, shown

_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora(?:_linear_layer)?[._])?"
    r"(?P<kind>A|B|down|up|alpha|magnitude_vector)(?:\.weight)?"
)
_KINDS = {"down": "A", "up": "B"}
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}


@dataclass(frozen=True)
class Layer:
    """What an adapter is on one layer."""

    rank: int
    scale: float
    """What the product of its factors is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
    dora: bool


Found = dict[str, Layer]
"""By layer, as `spelled`."""


def spelled(layer: str) -> str:
    """One spelling for `unet.a.b` and kohya's `lora_unet_a_b`, `text_encoder.text_model.a` and
    `lora_te_text_model_a`."""
    name = re.sub(r"^te1?_", "text_encoder_", layer.replace(".", "_").removeprefix("lora_"))
    return name.replace("text_encoder_text_model_", "text_encoder_")


def find(text: str) -> Path:
    """The LoRA file that `lora.start_from` names. Raises UserError where there is none, or where
    embeddings belong to it, which only textual inversion could go on from."""
    try:
        adapter = adapter_file.find(text)
    except UserError as error:
        raise UserError(_named(str(error))) from None
    if adapter.file is None or adapter.embeddings:
        raise UserError(
            f"lora.start_from={text} has embeddings of new words; give a LoRA, or the file of one "
            "that was trained without them"
        )
    if adapter.scale != 1:
        raise UserError(f"lora.start_from={text}: leave out the scale, training goes on at 1")
    return adapter.file


def _named(message: str) -> str:
    return message.replace("adapters=", "lora.start_from=")


def check(file: Path, wanted: Mapping[str, Layer], base: adapter_file.Shapes | None = None) -> None:
    """Raises UserError unless the file has an adapter on just the layers wanted, of their ranks and
    scales.

    base: shapes of the base's layers by spelling, so that an adapter of another family is called
    that.
    """
    if base is not None:
        try:
            adapter_file.check([adapter_file.Adapter(file, 1.0)], base)
        except UserError as error:
            raise UserError(f"lora.start_from={error}") from None
    found = described(file)
    _check_layers(file, found, wanted)
    for name, layer in wanted.items():
        _check_layer(file, name, found[name], layer)


def _check_layers(file: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    remedy = "set lora.targets, lora.blocks and lora.text_encoder as it was trained"
    for names, does in (
        (set(found) - set(wanted), "changes layers that this run leaves alone"),
        (set(wanted) - set(found), "lacks layers that this run changes"),
    ):
        if names:
            raise UserError(
                f"lora.start_from={file} {does} ({len(names)}, like {min(names)}): {remedy}"
            )


def _check_layer(file: Path, name: str, found: Layer, wanted: Layer) -> None:
    of_text = name.startswith("text_encoder_")
    section = "lora.text_encoder" if of_text else "lora"
    start = f"lora.start_from={file}"
    if found.rank != wanted.rank:
        keys = f"{section}.rank" if of_text else "lora.rank or lora.blocks"
        raise UserError(
            f"{start} has rank {found.rank}, and {keys} makes it {wanted.rank} (in {name}): set it "
            f"to {found.rank}"
        )
    if found.dora != wanted.dora:
        raise UserError(f"{start} was trained with lora.dora={str(found.dora).lower()}: set that")
    if not math.isclose(found.scale, wanted.scale, rel_tol=1e-3):  # kohya's alphas may be fp16
        raise UserError(
            f"{start} was trained at scale {found.scale:.4g}, and {section}.alpha makes it "
            f"{wanted.scale:.4g} (in {name}): set {section}.alpha to {found.scale:.4g} times "
            f"{section}.rank, with lora.rank_stabilised=false"
        )


def described(file: Path) -> Found:
    """What the file's adapter is on each layer. Raises UserError for what training cannot go on
    from."""
    header = read_header(file)
    settings = adapter_settings.read(file, header.metadata)
    layers: dict[str, dict[str, Entry]] = {}
    for name, entry in header.tensors.items():
        layer, kind = _parsed(file, name)
        if kind in layers.setdefault(layer, {}):
            raise UserError(f"lora.start_from={file} holds {shown(layer)} in two spellings")
        layers[layer][kind] = entry
    found: Found = {}
    for layer, parts in layers.items():
        if spelled(layer) in found:
            raise UserError(f"lora.start_from={file} holds {shown(layer)} in two spellings")
        rank = _rank(file, layer, parts)
        alpha = _scalar(file, layer, parts["alpha"]) if "alpha" in parts else None
        scale = _scale(layer, rank, settings) if alpha is None else alpha / rank
        found[spelled(layer)] = Layer(rank, scale, "magnitude_vector" in parts)
    return found


def _rank(file: Path, layer: str, parts: Mapping[str, Entry]) -> int:
    if not {"A", "B"} <= parts.keys():
        raise UserError(f"lora.start_from={file}: {shown(layer)} lacks one of its two factors")
    down, up = parts["A"].shape, parts["B"].shape
    if len(down) < 2 or len(up) < 2 or down[0] != up[1] or down[0] < 1:
        raise UserError(
            f"lora.start_from={file}: the two factors of {shown(layer)}, {down} and {up}, do not "
            "make one layer"
        )
    return down[0]


def _parsed(file: Path, name: str) -> tuple[str, str]:
    """The layer of a tensor, and which of its tensors it is."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise UserError(
            f"lora.start_from={file} holds {shown(name)}, which is no tensor of a LoRA that "
            "training can go on from (diffusers' or kohya's, without their variants)"
        )
    return match["layer"], _KINDS.get(match["kind"], match["kind"])


def _scale(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    """As diffusers reads it: 1 where nothing says otherwise."""
    part, _, module = layer.partition(".")
    own = {k.removeprefix(f"{part}."): v for k, v in settings.items() if k.startswith(f"{part}.")}
    if "lora_alpha" not in own:
        return 1.0
    module = module.removeprefix("text_model.")
    patterns = (own.get("alpha_pattern") or {}).items()
    fitting = (alpha for key, alpha in patterns if _pattern(key).match(module))
    alpha = float(next(fitting, own["lora_alpha"]))
    return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)


@lru_cache(maxsize=adapter_settings.MAX_PATTERNS)
def _pattern(key: str) -> re.Pattern[str]:
    """As PEFT reads it; `adapter_settings` lets nothing else than names be one."""
    return re.compile(rf"(.*\.)?({key})$")


def _scalar(file: Path, layer: str, entry: Entry) -> float:
    """The one number of a tensor, without the weight of a library that knows bfloat16."""
    if math.prod(entry.shape) != 1 or entry.dtype not in _SCALARS:
        raise UserError(
            f"lora.start_from={file}: the alpha of {shown(layer)} is {entry.dtype} of shape "
            f"{entry.shape}, and not one number"
        )
    raw = read_bytes(file, entry)
    number = struct.unpack(_SCALARS[entry.dtype], raw if entry.dtype != "BF16" else b"\0\0" + raw)
    return float(number[0])


def load(file: Path, parameters: Mapping[str, Any]) -> None:
    """Copies a checked file's values into adapters. Raises UserError, with none copied, for one of
    another size or with numbers that are not finite.

    parameters: by spelling and kind, as `unet_mid_block_.../A`; B, and DoRA's magnitude_vector.
    """
    import torch
    from safetensors.torch import load_file

    tensors = {_parsed(file, name): value for name, value in load_file(file).items()}
    values = {f"{spelled(layer)}/{kind}": value for (layer, kind), value in tensors.items()}
    for name, parameter in parameters.items():
        value = values[name]
        if value.numel() != parameter.numel():
            raise UserError(
                f"lora.start_from={file}: {name} is {tuple(value.shape)}, and the base needs "
                f"{tuple(parameter.shape)}: use the base it was trained on"
            )
        if not value.isfinite().all():
            raise UserError(
                f"lora.start_from={file} is not finite in {name}: its training had diverged; give "
                "an earlier adapter"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name].reshape(parameter.shape))
