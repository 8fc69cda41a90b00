"""Folders and hub ids of transformers models: what they hold, and what they lack."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.config import UserError

TEXT_AND_PICTURES = ("clip",)
PICTURES = ("vit", "dinov2", "dinov2_with_registers")
KINDS = (*TEXT_AND_PICTURES, *PICTURES)
# What some checkpoints lack and no feature depends on.
UNUSED = ("mask_token", "logit_scale", "pooler.dense.weight", "pooler.dense.bias")


def find_folder(path: str | Path) -> Path:
    """The local folder, downloaded if it is a hub id; UserError where it cannot be an extractor."""
    folder = Path(path)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
            raise UserError(
                f"no CLIP folder at {path}, nor one of DINO or DINOv2, nor an Inception file: give "
                "the folder of such a model, its hub id, or the file"
            )
        folder = _download(str(path))
    _check(folder)
    return folder


def kind_of(folder: Path) -> str:
    """Its model_type."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(content.get("model_type"))
    except (ValueError, AttributeError):
        raise UserError(
            f"{folder / 'config.json'} is not the JSON of a model: save the model there again"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The files that its weights are loaded from: safetensors where there are any."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
    return []


def hash_files(files: Iterable[Path]) -> str:
    """What `cat FILES | sha256sum` prints."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load(model: Any, folder: Path, **options: Any) -> Any:
    """The transformers class `model` with the folder's weights, in float32, on the CPU and frozen.
    UserError where the weights are damaged or are not that model's."""
    safe = weight_files(folder)[0].suffix == ".safetensors"
    try:
        loaded, found = model.from_pretrained(
            folder, use_safetensors=safe, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the weights in {folder} cannot be loaded ({reason}): save or fetch the model again"
        ) from None
    lost = sorted(name for name in found["missing_keys"] if not name.endswith(UNUSED))
    if lost:
        raise UserError(
            f"the weights in {folder} lack {len(lost)} of the {type(loaded).__name__}'s, "
            f"{lost[0]} for one: save or fetch the model again"
        )
    _align(loaded)
    return loaded.float().eval().requires_grad_(False)


def _align(model: Any) -> None:
    """Copies weights out of the mapped file, where they begin at odd addresses: which kernel
    multiplies, and so the last bits, depends on that too."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _check(folder: Path) -> None:
    needed = ("config.json", "preprocessor_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: save the model and its image processor, and of "
            "a CLIP its CLIPTokenizer, into one folder"
        )
    kind = kind_of(folder)
    if kind not in KINDS:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, expected one of {', '.join(KINDS)}: give "
            "the folder of a CLIP, DINO or DINOv2 model"
        )
    tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if kind in TEXT_AND_PICTURES and not tokenizer:
        raise UserError(f"{folder} has no tokenizer: save its CLIPTokenizer there")
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights: re-save it as safetensors")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)} of its weights: fetch or copy them again"
        )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        if not weight_files(folder):  # the first DINO is older than safetensors
            snapshot_download(hub_id, allow_patterns=[*patterns, "pytorch_model*.bin"])
        return folder
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{hub_id} is neither a folder here nor a hub id that can be fetched ({reason}): "
            "give a local folder"
        ) from None
