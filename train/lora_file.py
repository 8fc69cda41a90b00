"""What a LoRA file is on each layer, in diffusers' spelling or kohya's, from its header alone."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from train import adapter_settings
from train.config import UserError
from train.safetensors_file import Entry, read_bytes, read_header, shown

_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora(?:_linear_layer)?[._])?"
    r"(?P<kind>A|B|down|up|alpha|magnitude_vector|dora_scale)(?:\.default)?(?:\.weight)?"
)
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_")
_KINDS = {"down": "A", "up": "B", "dora_scale": "magnitude_vector"}
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}
# Other ways to change weights that are spread in kohya's spelling, most of them by LyCORIS.
_VARIANTS = {
    "a LoHa": r"\.hada_[wt]\d",
    "a LoKr": r"\.lokr_[wt]\d",
    "an OFT": r"\.oft_",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "an IA3": r"\.on_input$",
    "a LoRA in Tucker form": r"\.lora_mid\.weight$",
    "a change of whole weights": r"\.(?:diff|diff_b|set_weight|w_norm|b_norm)(?:\.weight)?$",
    "a LoRA with embeddings bundled in": r"^bundle_emb\.",
}


@dataclass(frozen=True)
class FileLayer:
    """An adapter on one layer."""

    rank: int
    scale: float
    """What the product of its factors is multiplied by."""
    shape: tuple[int, ...]
    """Of the change: (outputs, inputs) or (outputs, inputs, k, k)."""
    names: Mapping[str, str]
    """The file's name of each of its tensors: A, B, and where there are such alpha and DoRA's
    magnitude_vector."""

    @property
    def dora(self) -> bool:
        return "magnitude_vector" in self.names

    @property
    def alpha(self) -> float:
        """The alpha of which scale = alpha / rank, rank-stabilised or not."""
        return self.scale * self.rank


def is_kohya(names: Iterable[str]) -> bool:
    """Whether a file's tensors are named as kohya does."""
    return any(name.startswith(_KOHYA) for name in names)


def spelled(layer: str) -> str:
    """One spelling for `unet.a.b` and kohya's `lora_unet_a_b`, `text_encoder.text_model.a` and
    `lora_te_text_model_a`."""
    name = re.sub(r"^te1?_", "text_encoder_", layer.replace(".", "_").removeprefix("lora_"))
    return name.replace("text_encoder_text_model_", "text_encoder_")


def tells_text_width(layer: str) -> bool:
    """Whether a layer, as `spelled`, has as many inputs as the base's text has numbers."""
    return layer.endswith(("attn2_to_k", "attn2_to_v")) or bool(
        re.fullmatch(r"text_encoder_encoder_layers_\d+_self_attn_[qkv]_proj", layer)
    )


def layers(file: Path) -> dict[str, FileLayer]:
    """The adapter's layers by their names in the file, which `spelled` makes one spelling of.

    Raises UserError for a file that cannot be read, settings or variants that are not of a plain
    LoRA or DoRA, and tensors that do not make layers.
    """
    header = read_header(file)
    settings = adapter_settings.read(file, header.metadata)
    refuse_variants(file, header.tensors)
    named: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        layer, kind = _parsed(file, name)
        if kind in named.setdefault(layer, {}):
            raise _twice(file, layer)
        named[layer][kind] = name
    known: set[str] = set()
    for layer in named:
        if spelled(layer) in known:
            raise _twice(file, layer)
        known.add(spelled(layer))
    return {n: _layer(file, n, names, header.tensors, settings) for n, names in named.items()}


def _twice(file: Path, layer: str) -> UserError:
    return UserError(f"{file} holds {shown(layer)} in two spellings")


def refuse_variants(file: Path, names: Iterable[str]) -> None:
    """Raises UserError naming what the file is, where it is a relative of LoRA that is not one."""
    for name in names:
        variant = next((v for v, there in _VARIANTS.items() if re.search(there, name)), None)
        if variant:
            raise UserError(
                f"{file} holds {shown(name)}, as {variant} does. Only LoRA and DoRA are read here: "
                "merge it into its base with the tool it was made by, and extract a LoRA from that"
            )


def _parsed(file: Path, name: str) -> tuple[str, str]:
    """The layer of a tensor, and which of its tensors it is."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise UserError(
            f"{file} holds {shown(name)}, which is no tensor of a LoRA that can be read here "
            "(diffusers' or kohya's, without their variants)"
        )
    return match["layer"], _KINDS.get(match["kind"], match["kind"])


def _layer(
    file: Path,
    layer: str,
    names: Mapping[str, str],
    tensors: Mapping[str, Entry],
    settings: Mapping[str, Any],
) -> FileLayer:
    if not {"A", "B"} <= names.keys():
        raise UserError(f"{file}: {shown(layer)} lacks one of its two factors")
    down, up = tensors[names["A"]].shape, tensors[names["B"]].shape
    sound = len(down) in (2, 4) and len(up) in (2, 4) and down[0] == up[1] and down[0] > 0
    if not sound or any(n != 1 for n in up[2:]):
        raise UserError(
            f"{file}: the two factors of {shown(layer)}, {down} and {up}, do not make one layer"
        )
    rank = down[0]
    if "alpha" in names:
        scale = _scalar(file, layer, tensors[names["alpha"]]) / rank
    else:
        scale = _scale(layer, rank, settings)
    if "magnitude_vector" in names:
        _check_magnitudes(file, names["magnitude_vector"], tensors, up[0])
    return FileLayer(rank, scale, (up[0], *down[1:]), names)


def _check_magnitudes(file: Path, name: str, tensors: Mapping[str, Entry], outputs: int) -> None:
    """That there is one for each output: (n,), kohya's (n, 1...) or PEFT's (1, n, 1, 1)."""
    shape = tensors[name].shape
    is_peft = len(shape) == 4 and not name.endswith("dora_scale")
    if shape[is_peft : is_peft + 1] != (outputs,) or math.prod(shape) != outputs:
        raise UserError(
            f"{file}: DoRA's magnitudes {shown(name)} are {shape}, not one for each of {outputs} "
            "outputs. Those for each input (LyCORIS's wd_on_out=False) cannot be read here"
        )


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
            f"{file}: the alpha of {shown(layer)} is {entry.dtype} of shape {entry.shape}, and not "
            "one number"
        )
    raw = read_bytes(file, entry)
    number = struct.unpack(_SCALARS[entry.dtype], raw if entry.dtype != "BF16" else b"\0\0" + raw)
    if not math.isfinite(number[0]):
        raise UserError(f"{file}: the alpha of {shown(layer)} is {number[0]}")
    return float(number[0])
