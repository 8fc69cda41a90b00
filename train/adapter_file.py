"""LoRA files that are to be used with a base: finding one, and telling from its header alone
whether it fits.

Nothing here loads weights, so a wrong adapter is refused before anything is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import UserError

Shapes = dict[str, tuple[int, ...]]
Layers = dict[str, tuple[int | None, int | None]]

_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
# diffusers' spelling, its older ones, and kohya's.
_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora(?:_linear_layer)?[._](?P<side>A|B|down|up)(?:\.default)?\.weight"
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, and how strongly it acts."""

    file: Path
    scale: float


def find(text: str) -> Adapter:
    """`path` or `path:scale`, of a folder or file; UserError where there is no safetensors file."""
    path, scale = text, 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            path, scale = head, float(tail)
        except ValueError:
            raise UserError(
                f"adapters={text}: no such file or folder; a scale is a number, like {head}:0.5"
            ) from None
    if not math.isfinite(scale):
        raise UserError(f"adapters={text}: the scale must be a finite number")
    return Adapter(_file(Path(path)), scale)


def _file(path: Path) -> Path:
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise UserError(f"adapters={path}: no such file or folder")
    if path.suffix != ".safetensors":
        raise UserError(
            f"adapters={path} is not a .safetensors file. Pickles can run code when loaded and are "
            "refused; convert it to safetensors"
        )
    return path


def _in_folder(path: Path) -> Path:
    standard = path / "pytorch_lora_weights.safetensors"
    files = [standard] if standard.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"adapters={path} has {len(files)} .safetensors files; name one of them")
    if (path / "adapter").is_dir():
        raise UserError(f"adapters={path} is a run; its adapter is {path / 'adapter'}")
    raise UserError(f"adapters={path} has no pytorch_lora_weights.safetensors")


def check(adapters: Sequence[Adapter], base: Shapes) -> None:
    """Raises UserError unless every layer the adapters change is one of the base's, in shape too.

    base: from `folder_shapes` or `pipeline_shapes`.
    """
    for adapter in adapters:
        _check(adapter.file, base)


def _check(file: Path, base: Shapes) -> None:
    layers = _layers(header(file))
    if not layers:
        raise UserError(f"{file} holds no LoRA (no lora_A/lora_B or lora_down/lora_up weights)")
    _check_family(file, layers, base)
    for name, (inputs, outputs) in layers.items():
        shape = base.get(name)
        if shape is None or inputs not in (None, shape[1]) or outputs not in (None, shape[0]):
            has = f"has {shape[1]} -> {shape[0]}" if shape else "has no such layer"
            raise UserError(
                f"{file} does not fit the base: it changes {name} ({inputs} -> {outputs}), the "
                f"base {has}. Use the base it was trained on"
            )


def header(file: Path) -> Shapes:
    """Names and shapes of a safetensors file's tensors, without reading them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error})") from None


def folder_shapes(folder: Path) -> Shapes:
    """The layers an adapter could change, from the weight files of a diffusers folder."""
    return _changeable(
        (f"{part}.{key}", shape)
        for part in ("unet", "text_encoder")
        for file in sorted((folder / part).glob("*.safetensors"))
        for key, shape in header(file).items()
    )


def pipeline_shapes(pipeline: Any) -> Shapes:
    """The same from a loaded pipeline."""
    return _changeable(
        (f"{part}.{key}", tuple(parameter.shape))
        for part in ("unet", "text_encoder")
        for key, parameter in getattr(pipeline, part).named_parameters()
    )


def _changeable(named: Iterable[tuple[str, tuple[int, ...]]]) -> Shapes:
    return {
        _flat(key.removesuffix(".weight")): shape
        for key, shape in named
        if key.endswith(".weight") and len(shape) > 1
    }


def _layers(tensors: Shapes) -> Layers:
    """Inputs and outputs of every layer an adapter changes; None for a factor that is absent."""
    layers: Layers = {}
    for key, shape in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None or len(shape) < 2:
            continue
        name = _flat(match["module"])
        inputs, outputs = layers.get(name, (None, None))
        down = match["side"] in ("A", "down")
        layers[name] = (shape[1], outputs) if down else (inputs, shape[0])
    return layers


def _flat(module: str) -> str:
    """One spelling for `unet.a.b` and kohya's `lora_unet_a_b`, with or without CLIP's
    `text_model`."""
    name = module.replace(".", "_").removeprefix("lora_")
    name = re.sub(r"^te1?_", "text_encoder_", name)
    return name.replace("text_encoder_text_model_", "text_encoder_")


def _check_family(file: Path, layers: Layers, base: Shapes) -> None:
    """Names the family where the width of the text gives it away."""
    ours = _text_width((name, shape[1]) for name, shape in base.items())
    theirs = _text_width((name, inputs) for name, (inputs, _) in layers.items())
    if any(name.startswith(("text_encoder_2_", "te2_")) for name in layers):
        theirs = 2048
    if theirs is not None and theirs != ours:
        raise UserError(
            f"{file} is an adapter of {_family(theirs)}, the base is {_family(ours)}; use the base "
            "it was trained on"
        )


def _text_width(layers: Iterable[tuple[str, int | None]]) -> int | None:
    return next((size for name, size in layers if name.endswith("attn2_to_k") and size), None)


def _family(width: int | None) -> str:
    return f"{_FAMILIES.get(width or 0, 'another model')} (cross-attention width {width})"


def apply(pipeline: Any, adapters: Sequence[Adapter]) -> None:
    """Loads checked adapters, all active together, each at its scale."""
    names = [f"adapter_{index}" for index in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        try:
            pipeline.load_lora_weights(
                str(adapter.file.parent), weight_name=adapter.file.name, adapter_name=name
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{adapter.file} could not be applied: {error}") from None
    if names:
        pipeline.set_adapters(names, [adapter.scale for adapter in adapters])
