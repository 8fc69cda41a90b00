"""A whole Stable Diffusion 1 or 2 as one file in the layout of its authors' code (LDM), which web
UIs read, from a diffusers folder, and the tensors of either under one and the same names.

Tensors are read and written one by one, so that a model is converted in the memory of its largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import base_layers, ldm_names, stored_tensors
from train.config import ModelConfig, UserError
from train.families import DEPTH_CHANNELS, BaseModel
from train.inspection import inspect, read_json, weight_files
from train.ldm_names import CLIP, DEPTH, OPEN_CLIP
from train.safetensors_file import shown
from train.stored_tensors import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tensors = dict[str, Stored]
Parts = dict[str, Tensors]
"""By part ("unet", "vae", "text_encoder"), tensors by diffusers' names of today."""

WORDS = 49_408  # rows of the layout's table of tokens, in SD 1 and 2
_USED_LAYERS = 23  # of SD 2's text encoder; the layout has one more


def to_single_file(
    folder: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> list[str]:
    """Writes a diffusers folder of SD 1 or 2 (text-to-image, depth, inpainting) as one file.

    dtype: of its weights; None keeps the folder's. metadata: for its header, over modelspec's
    entries, which are written anyway. source: the file in this layout that the folder comes from,
    for what a folder lacks: the last layer of SD 2's text, which is not used, its projection and
    logit scale, and a depth model's estimator. Without it the layer is a copy of the one before,
    the projection the identity, and the estimator left out.

    Beside a model of SD 2, or one that predicts v, NAME.yaml is written, which tells AUTOMATIC1111
    and Forge what they would have to guess. Returns notes on what other programs will not see by
    themselves. Raises UserError for a folder that has no place in the layout, and for numbers that
    are not finite or do not fit `dtype`.
    """
    from train import ldm_settings
    from train.rundir import check_space

    base = inspect(ModelConfig(path=str(folder)))
    _check_layout(folder, base)
    tensors = of_parts(parts_of_folder(folder), folder, source=source)
    tensors = stored_tensors.cast(tensors, dtype) | ldm_settings.schedule(folder)
    check_space(output.parent, sum(t.size for t in tensors.values()), what="the file")
    about = ldm_settings.modelspec(base, output.stem) | dict(metadata or {})
    stored_tensors.write(output, tensors, about, hashed=ldm_settings.HASH)
    ldm_settings.write_yaml(folder, base, output.with_suffix(".yaml"))
    return [*_cut_words(folder), *ldm_settings.notes(folder, base, tensors)]


def parts_of_folder(folder: Path) -> Parts:
    """The weights of a diffusers folder.

    Raises UserError where one is missing or of another shape than its config.json says.
    """
    found: Parts = {}
    for part, shapes in _shapes(folder).items():
        stored = stored_tensors.of_files(weight_files(folder, part))
        there = {ldm_names.todays(part, name): tensor for name, tensor in stored.items()}
        found[part] = _complete(folder / part, there, shapes)
    return found


def parts_of_file(file: Path, config: Path) -> Parts:
    """The weights of a single file. config: a diffusers folder like it, for its JSON.

    Raises UserError where one is missing or of another shape than `config` says.
    """
    stored, places = stored_tensors.of_files([file]), _places(config)
    found: Parts = {}
    for part, shapes in _shapes(config).items():
        there = {name: places[part](name) for name in shapes}
        pieces = {
            name: _piece(stored[place], third, shapes[name])
            for name, (place, third) in there.items()
            if place in stored
        }
        found[part] = _complete(file, pieces, shapes)
    return found


def of_parts(parts: Parts, config: Path, *, source: Path | None = None) -> Tensors:
    """A model's tensors in the layout, with those that only the layout has.

    config: the folder of its JSON. source: as `to_single_file` has it.
    """
    places = _places(config)
    placed: dict[str, dict[int, Stored]] = {}
    for part, tensors in parts.items():
        for name, stored in tensors.items():
            place, third = places[part](name)
            placed.setdefault(place, {})[third or 0] = stored
    found = {place: _whole(place, pieces) for place, pieces in placed.items()}
    made = _unused(found) if f"{OPEN_CLIP}ln_final.weight" in found else _positions(found)
    kept = stored_tensors.of_files([source]) if source else {}
    depth = parts["unet"]["conv_in.weight"].shape[1] == DEPTH_CHANNELS
    return found | made | {name: t for name, t in kept.items() if _is_kept(name, t, made, depth)}


def layout(config: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the layout of the model that a diffusers folder's JSON describes."""
    parts = {
        part: {name: Stored("F32", shape, _unread) for name, shape in shapes.items()}
        for part, shapes in _shapes(config).items()
    }
    return {name: stored.shape for name, stored in of_parts(parts, config).items()}


def _unread() -> Tensor:
    raise AssertionError("only its shape is asked for")


def _is_kept(name: str, stored: Stored, made: Tensors, depth: bool) -> bool:
    if name in made:
        return stored.shape == made[name].shape
    return depth and name.startswith(DEPTH)


def _whole(place: str, pieces: Mapping[int, Stored]) -> Stored:
    """A tensor of the layout, of the one or the three that folders have."""
    first = pieces[0]
    if len(pieces) > 1:
        return _joined([pieces[index] for index in range(len(pieces))])
    if ".mid.attn_1." in place and len(first.shape) == 2:
        return first.changed(lambda t: t[:, :, None, None], (*first.shape, 1, 1))
    if place.endswith("token_embedding.weight") and first.shape[0] > WORDS:
        return first.changed(lambda t: t[:WORDS], (WORDS, *first.shape[1:]))
    return first


def _joined(pieces: list[Stored]) -> Stored:
    def read(_: Tensor) -> Tensor:
        import torch

        return torch.cat([piece.read() for piece in pieces])

    rows, *rest = pieces[0].shape
    return pieces[0].changed(read, (len(pieces) * rows, *rest))


def _piece(stored: Stored, third: int | None, shape: tuple[int, ...]) -> Stored:
    """What a folder has of a tensor of the layout; 1x1 convolutions there may be matrices here."""
    if third is not None:
        rows = stored.shape[0] // 3
        return stored.changed(
            lambda t: t[third * rows : (third + 1) * rows], (rows, *stored.shape[1:])
        )
    longer = max(stored.shape, shape, key=len)
    if longer[:2] == min(stored.shape, shape, key=len) and set(longer[2:]) == {1}:
        return stored.changed(lambda t: t.reshape(shape), shape)
    return stored


def _unused(found: Tensors) -> Tensors:
    """What OpenCLIP's text encoder has that SD 2 does not use, as it is without its source."""
    import torch

    layers = f"{OPEN_CLIP}transformer.resblocks."
    last = max(int(name[len(layers) :].split(".")[0]) for name in found if name.startswith(layers))
    before = f"{layers}{last}."
    width = found[f"{OPEN_CLIP}ln_final.weight"].shape[0]
    logit_scale = torch.tensor(math.log(100.0))  # as OpenCLIP bounds it, and ViT-H ends
    return {
        **{
            f"{layers}{last + 1}.{name.removeprefix(before)}": stored
            for name, stored in found.items()
            if name.startswith(before)
        },
        f"{OPEN_CLIP}text_projection": stored_tensors.of_tensor(torch.eye(width)),
        f"{OPEN_CLIP}logit_scale": stored_tensors.of_tensor(logit_scale),
    }


def _positions(found: Tensors) -> Tensors:
    """The positions' numbers, a part of SD 1's text encoder in transformers up to 4.30."""
    import torch

    path = f"{CLIP}text_model.embeddings.position_"
    count = found[f"{path}embedding.weight"].shape[0]
    return {f"{path}ids": stored_tensors.of_tensor(torch.arange(count)[None])}


def _places(config: Path) -> dict[str, Any]:
    return ldm_names.places(_settings(config, "unet"), _settings(config, "vae"))


def _settings(config: Path, part: str) -> dict[str, Any]:
    return read_json(config / part / "config.json", f"{part} has no configuration")


def _shapes(config: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """By part, the shapes of the tensors that its config.json stands for, by name."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig.from_dict(_settings(config, "text_encoder"))
    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(_settings(config, "unet")),
            "vae": AutoencoderKL.from_config(_settings(config, "vae")),
            "text_encoder": CLIPTextModel(text),
        }
    return {
        part: {
            ldm_names.todays(part, name): tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
        }
        for part, model in models.items()
    }


def _complete(where: Path, there: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Those of `shapes`. Raises UserError where one is absent or different."""
    for name, shape in shapes.items():
        if name not in there or there[name].shape != shape:
            what = f"as {there[name].shape}" if name in there else "not at all"
            raise UserError(
                f"{where} has {shown(name)} {what}, and its configuration asks for {shape}: "
                "download or export it again, with the config.json that belongs to it"
            )
    return {name: there[name] for name in shapes}


def _check_layout(folder: Path, base: BaseModel) -> None:
    """Raises UserError for a model whose parts have no names in the layout."""
    usual = base_layers.of_base(ModelConfig(path=str(folder))) is not None
    vae = _settings(folder, "vae")
    blocks = {*vae.get("down_block_types", []), *vae.get("up_block_types", [])}
    if not usual or not blocks <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise UserError(f"{folder} has blocks that the layout of a single file has no names for")
    layers = _settings(folder, "text_encoder").get("num_hidden_layers", 12)
    if base.family.generation == 2 and layers > _USED_LAYERS:
        raise UserError(
            f"{folder}: its text encoder has {layers} layers and gives the last one's output, "
            f"where SD 2 as a single file gives that of layer {_USED_LAYERS}. Use the folder of a "
            "published SD 2"
        )


def _cut_words(folder: Path) -> list[str]:
    more = _settings(folder, "text_encoder").get("vocab_size", WORDS) - WORDS
    if more <= 0:
        return []
    return [
        f"{more} new words are not in the file, whose table has {WORDS} rows in every program: "
        "give them their embeddings beside it (format=kohya of textual inversion)"
    ]
