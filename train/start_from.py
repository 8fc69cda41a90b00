"""lora.start_from: an adapter that a run goes on from, in diffusers' format or kohya's.

Whether it fits is told from its header; nothing is loaded before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train import adapter_file, lora_file
from train.config import UserError
from train.lora_file import spelled


@dataclass(frozen=True)
class Layer:
    """What an adapter is on one layer."""

    rank: int
    scale: float
    """What the product of its factors is multiplied by: alpha / rank, or alpha / sqrt(rank)."""
    dora: bool


Found = dict[str, Layer]
"""By layer, as `spelled`."""


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
    return {
        spelled(name): Layer(layer.rank, layer.scale, layer.dora)
        for name, layer in _layers(file).items()
    }


def _layers(file: Path) -> dict[str, lora_file.FileLayer]:
    try:
        return lora_file.layers(file)
    except UserError as error:
        raise UserError(f"lora.start_from={error}") from None


def load(file: Path, parameters: Mapping[str, Any]) -> None:
    """Copies a checked file's values into adapters. Raises UserError, with none copied, for one of
    another size or with numbers that are not finite.

    parameters: by spelling and kind, as `unet_mid_block_.../A`; B, and DoRA's magnitude_vector.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    values = {
        f"{spelled(name)}/{kind}": tensors[tensor]
        for name, layer in _layers(file).items()
        for kind, tensor in layer.names.items()
    }
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
