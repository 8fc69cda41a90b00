"""LoRA files in kohya's format, which AUTOMATIC1111, Forge, ComfyUI and kohya's own tools read, and
in diffusers': the names and tensors of one made of those of the other.

A layer is called by the path of its module with `_` for `.`, `lora_unet_...` or `lora_te_...`, and
has `lora_down.weight`, `lora_up.weight`, `alpha` (its scale is alpha / rank) and with DoRA
`dora_scale`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import adapter_metadata, lora_file
from train.adapter_file import EMBEDDING
from train.adapter_settings import KEY
from train.config import UserError
from train.lora_file import FileLayer, spelled
from train.safetensors_file import read_header, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
_KINDS = {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude_vector": "dora_scale"}
# The names within diffusers' UNet and CLIP's text encoder that hold a `_` themselves.
_WORDS = re.compile(
    r"(?<![a-z0-9])(?:down_blocks|mid_block|up_blocks|transformer_blocks|proj_in|proj_out|to_q|to_k|"
    r"to_v|to_out|conv_in|conv_out|conv_shortcut|time_embedding|linear_1|linear_2|time_emb_proj|"
    r"self_attn|q_proj|k_proj|v_proj|out_proj)(?![a-z0-9])"
)
_ATTENTION = re.compile(
    r"text_encoder_encoder_layers_(?P<number>\d+)_self_attn_(?P<which>[a-z]+)_proj"
)
# The modules that a layer's path begins with in diffusers' UNet and in CLIP's text encoder.
_MODULES = {
    "unet": r"conv_in|time_embedding|down_blocks|mid_block|up_blocks|conv_out",
    "text_encoder": r"embeddings|encoder|final_layer_norm",
}
_LDM = re.compile(r"unet_(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_")
_SECOND = re.compile(r"te2_|text_encoder_2_")
_XL_WIDTH = 2048  # of the text
_TOGETHER = ("q", "k", "v", "out")  # one matrix in OpenCLIP's text encoder, and its output's
_COARSE = 0.01  # share of a tensor that rounding may change without a word


def name_of(layer: str) -> str:
    """kohya's name of a layer from any other: `lora_unet_...`, `lora_te_text_model_...`."""
    name = spelled(layer).replace("text_encoder_", "te_text_model_", 1)
    return f"lora_{name}"


def path_of(layer: str) -> str:
    """diffusers' name of a layer from any other: `unet.mid_block...`,
    `text_encoder.text_model...`. Raises UserError for a layer that neither of the two has."""
    name = spelled(layer)
    _check_name(layer, name)
    part = "text_encoder" if name.startswith("text_encoder_") else name.partition("_")[0]
    words = _WORDS.sub(lambda match: match[0].replace("_", " "), name.removeprefix(f"{part}_"))
    within = "text_model." if part == "text_encoder" else ""
    return f"{part}.{within}{words.replace('_', '.').replace(' ', '_')}"


def _check_name(layer: str, name: str) -> None:
    """That a layer, `name` as `spelled`, is one of Stable Diffusion 1 and 2."""
    begins = (f"{part}_(?:{modules})(?:_|$)" for part, modules in _MODULES.items())
    if any(re.match(one, name) for one in begins):
        return
    if _SECOND.match(name):
        why = "is of a second text encoder, as Stable Diffusion XL has"
    elif _LDM.match(name):
        why = "is of a UNet with the names of single files, as LoRAs of Stable Diffusion XL have"
    else:
        why = "is no layer of the UNet or the text encoder"
    raise UserError(f"{shown(layer)} {why}: only LoRAs of Stable Diffusion 1 and 2 are read here")


def _check_family(file: Path, layers: Mapping[str, FileLayer]) -> None:
    """Raises UserError for a LoRA of another family than Stable Diffusion 1 and 2."""
    for layer, about in layers.items():
        name = spelled(layer)
        try:
            _check_name(layer, name)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        if lora_file.tells_text_width(name) and about.shape[1] == _XL_WIDTH:
            raise UserError(
                f"{file}: {shown(layer)} takes text {_XL_WIDTH} wide, as Stable Diffusion XL's is: "
                "only LoRAs of Stable Diffusion 1 and 2 are read here"
            )


def from_diffusers(
    file: Path, *, dtype: torch.dtype | None = None, base_shapes: Shapes | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """A LoRA file's tensors as kohya's format has them, and what should be known of them.

    Every alpha is an fp32 scalar of its own, whatever the file's settings made the scale of.
    dtype: of the other tensors; default: as they are. base_shapes: of the base's weights by
    spelling, which tell linear layers from 1x1 convolutions; default: as trained. Raises UserError
    for what is no LoRA of SD 1 or 2, does not fit the base, is not finite or would not be in
    `dtype`.
    """
    import torch

    layers = lora_file.layers(file)
    tensors, coarse = _converted(file, layers, KOHYA, dtype, base_shapes)
    for name, layer in layers.items():
        tensors[f"{name_of(name)}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return tensors, [*coarse, *_warnings(layers)]


def to_diffusers(
    file: Path, *, dtype: torch.dtype | None = None, base_shapes: Shapes | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """A LoRA file's tensors as diffusers' format has them, their settings (`unet.r`...), and what
    should be known of them. As `from_diffusers`; the file may be of either format."""
    layers = lora_file.layers(file)
    tensors, coarse = _converted(file, layers, DIFFUSERS, dtype, base_shapes)
    by_part: dict[str, dict[str, FileLayer]] = {}
    for name, layer in layers.items():
        part, _, path = path_of(name).partition(".")
        by_part.setdefault(part, {})[path.removeprefix("text_model.")] = layer
    settings: dict[str, Any] = {}
    for part, own in by_part.items():
        settings |= {f"{part}.{key}": value for key, value in _settings(file, own).items()}
    return tensors, settings, coarse


def _settings(file: Path, layers: Mapping[str, FileLayer]) -> dict[str, Any]:
    """What PEFT is to make of the layers of one part, by their paths in it."""
    with_dora = {layer.dora for layer in layers.values()}
    if len(with_dora) > 1:
        raise UserError(f"{file} has DoRA's magnitudes on some of its layers only")
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    rank, alpha = usual(ranks.values()), usual(alphas.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "target_modules": sorted(layers),
        "use_dora": with_dora == {True},
        "inference_mode": True,
    }


@dataclass(frozen=True)
class Format:
    """How a tensor is called, from its layer and kind, and how DoRA's magnitudes lie, from the
    shape of the weight."""

    name: Callable[[str, str], str]
    magnitudes: Callable[[Shape], Shape]


def _kohya(layer: str, kind: str) -> str:
    return f"{name_of(layer)}.{_KINDS[kind]}"


def _diffusers(layer: str, kind: str) -> str:
    path = path_of(layer)
    # The text encoder's magnitudes are found by their whole names only, by transformers 5.
    bare = kind == "magnitude_vector" and path.startswith("unet.")
    return f"{path}.lora_{kind}" if bare else f"{path}.lora_{kind}.weight"


KOHYA = Format(_kohya, lambda shape: (shape[0], *(1,) * (len(shape) - 1)))
DIFFUSERS = Format(
    _diffusers, lambda shape: (shape[0],) if len(shape) == 2 else (1, shape[0], 1, 1)
)


def _converted(
    file: Path,
    layers: Mapping[str, FileLayer],
    format: Format,
    dtype: torch.dtype | None,
    base_shapes: Shapes | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in a format, without alphas, and a word on those that rounding changed."""
    from safetensors.torch import load_file

    _check_family(file, layers)
    content = load_file(file)
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for layer, about in layers.items():
        shape = _shape_on_base(file, layer, about.shape, base_shapes)
        shapes = {
            "A": (about.rank, *shape[1:]),
            "B": (shape[0], about.rank, *(1,) * (len(shape) - 2)),
            "magnitude_vector": format.magnitudes(shape),
        }
        for kind, wanted in shapes.items():
            if kind in about.names:
                name = format.name(layer, kind)
                exact = content[about.names[kind]].reshape(wanted)
                tensors[name], lost[name] = _rounded(file, name, exact, dtype or exact.dtype)
    return tensors, _on_rounding(lost, dtype)


def _shape_on_base(file: Path, layer: str, shape: Shape, base: Shapes | None) -> Shape:
    """The shape of the base's weight: where its kernel is 1x1, it may be of a linear layer."""
    if base is None:
        return shape
    there = base.get(spelled(layer))
    if there is None or (there[0], prod(there[1:])) != (shape[0], prod(shape[1:])):
        raise UserError(
            f"{file} does not fit the base: it changes {shown(layer)} by {shape}, and the base has "
            f"{there or 'no such layer'}. Use the base it was trained on"
        )
    return there


def _rounded(file: Path, name: str, exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A tensor in `dtype`, and the share of its norm that rounding took or added."""
    import torch

    if not exact.isfinite().all():
        raise UserError(
            f"{file} is not finite in {shown(name)}: its training had diverged; give an earlier "
            "adapter"
        )
    near = exact.to(dtype)
    if not near.isfinite().all():
        raise UserError(
            f"{file}: {shown(name)} goes up to {exact.abs().max():.3g}, and {_called(dtype)} only "
            f"to {torch.finfo(dtype).max:.3g}. Take precision=fp32 or bf16"
        )
    norm = float(exact.double().norm())
    return near, float((near.double() - exact.double()).norm()) / norm if norm else 0.0


def _on_rounding(lost: Mapping[str, float], dtype: torch.dtype | None) -> list[str]:
    coarse = {name: share for name, share in lost.items() if share > _COARSE}
    if dtype is None or not coarse:
        return []
    worst = max(coarse, key=lambda name: coarse[name])
    return [
        f"{_called(dtype)} changes {len(coarse)} of {len(lost)} tensors by more than "
        f"{100 * _COARSE:.0f} %, {worst} by {100 * coarse[worst]:.2g} %: take precision=fp32"
    ]


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _warnings(layers: Mapping[str, FileLayer]) -> list[str]:
    return [*_on_partial_attention(layers), *_on_dora(layers), *_on_alphas(layers)]


def _on_partial_attention(layers: Iterable[str]) -> list[str]:
    """Of text encoders with some of q, k, v and out: in OpenCLIP's, as SD 2's is in the LDM layout,
    the first three are one matrix, and AUTOMATIC1111 changes it with all four or not at all."""
    found: dict[str, set[str]] = {}
    for layer in layers:
        match = _ATTENTION.fullmatch(spelled(layer))
        if match:
            found.setdefault(match["number"], set()).add(match["which"])
    partial = {n: f"{_list(has)} without {_list({*_TOGETHER} - has)}" for n, has in found.items()}
    partial = {n: text for n, text in partial.items() if found[n] != {*_TOGETHER}}
    if not partial:
        return []
    by_text = Counter(partial.values())
    which = "; ".join(
        f"{text} in layers {', '.join(sorted((n for n in partial if partial[n] == text), key=int))}"
        for text in by_text
    )
    return [
        "AUTOMATIC1111 leaves out a change of the text encoder's attention on Stable Diffusion 2, "
        f"and says nothing, unless it is of all of q, k, v and out. This has {which}. "
        "format=merged or format=single_file looks the same everywhere"
    ]


def _list(names: set[str]) -> str:
    return ", ".join(name for name in _TOGETHER if name in names)


def _on_dora(layers: Mapping[str, FileLayer]) -> list[str]:
    if not any(layer.dora for layer in layers.values()):
        return []
    return [
        "DoRA's magnitudes (dora_scale), here one for each output, are not read alike: "
        "AUTOMATIC1111 divides by the norms for each input, ComfyUI by those of the base's own "
        "weight, and diffusers leaves them out. format=merged or format=single_file looks the same "
        "everywhere"
    ]


def _on_alphas(layers: Mapping[str, FileLayer]) -> list[str]:
    for part in ("unet_", "text_encoder_"):
        if len({a.alpha for name, a in layers.items() if spelled(name).startswith(part)}) > 1:
            return [
                "the alphas differ from layer to layer, which diffusers' load_lora_weights does "
                "not see in this format; give it the export of format=diffusers"
            ]
    return []


def usual(values: Iterable[Any]) -> Any:
    """The value that is there most often."""
    return Counter(values).most_common(1)[0][0]


def write(
    adapter_file: Path,
    output: Path,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    base_shapes: Shapes | None = None,
) -> list[str]:
    """Writes a LoRA file in kohya's format; returns what should be known of it. As
    `from_diffusers`, with the metadata, which its hashes are added to."""
    tensors, warnings = from_diffusers(adapter_file, dtype=dtype, base_shapes=base_shapes)
    return [*warnings, *adapter_metadata.write(output, tensors, metadata)]


def write_diffusers(
    adapter_file: Path,
    output: Path,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    base_shapes: Shapes | None = None,
) -> list[str]:
    """The same in diffusers' format, from either."""
    tensors, settings, warnings = to_diffusers(adapter_file, dtype=dtype, base_shapes=base_shapes)
    about = {**metadata, "format": "pt", KEY: json.dumps(settings, indent=2, sort_keys=True)}
    return [*warnings, *adapter_metadata.write(output, tensors, about)]


def write_embedding(
    learned_embeds: Path, output: Path, *, metadata: Mapping[str, str], dtype: torch.dtype
) -> list[str]:
    """Writes the embeddings of a word as {"emb_params": (n, d)}, which kohya's tools and web UIs
    read and call by the file's name; returns what should be known of it. Raises UserError for a
    file of something else, and for what is not finite or would not be in `dtype`."""
    from safetensors.torch import load_file

    shapes = {name: entry.shape for name, entry in read_header(learned_embeds).tensors.items()}
    if len(shapes) != 1 or len(next(iter(shapes.values()))) not in (1, 2):
        raise UserError(
            f"{learned_embeds} holds {len(shapes)} tensors, and not the embeddings of one word"
        )
    ((word, rows),) = load_file(learned_embeds).items()
    rows, share = _rounded(learned_embeds, word, rows.reshape(-1, rows.shape[-1]), dtype)
    cut = adapter_metadata.write(output, {EMBEDDING: rows}, metadata)
    named = f"web UIs call an embedding by its file's name: write {output.stem} in prompts"
    own = [] if word in (EMBEDDING, output.stem) else [f"{named} in place of {shown(word)}"]
    return [*own, *_on_rounding({word: share}, dtype), *cut]
