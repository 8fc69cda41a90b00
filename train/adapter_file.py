"""LoRA and embedding files that are to be used with a base: finding them, and telling from their
headers alone whether they fit.

Nothing here loads weights before `apply`, so a wrong adapter is refused before anything is changed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokens import embedding_names
from train import adapter_settings, lora_file
from train.config import DiffusionConfig, UserError
from train.families import of_width
from train.inspection import read_json
from train.lora_file import refuse_variants, spelled, tells_text_width
from train.safetensors_file import read_header, shown

Shapes = dict[str, tuple[int, ...]]
Layers = dict[str, tuple[int | None, int | None]]

# diffusers' spelling, its older ones, and kohya's.
_FACTOR = re.compile(
    r"(?P<module>.+?)\.lora(?:_linear_layer)?[._](?P<side>A|B|down|up)(?:\.default)?\.weight"
)


LORA = "pytorch_lora_weights.safetensors"
_EMBEDDINGS = "learned_embeds*.safetensors"
EMBEDDING = "emb_params"  # what an embedding is called in a file whose own name is its word
# Of a scheduler's configuration, what an adapter was trained with, and diffusers' defaults.
_TRAINED_WITH = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
# There, what the base predicts that an adapter was trained on, which training may override. Of the
# names with an underscore diffusers makes nothing.
BASE_PREDICTION = "_base_prediction_type"


# What the base of one of kohya's files predicts.
_VERSIONS = {"sd_v2": "epsilon", "sd_v2_v": "v_prediction"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA file and how strongly it acts, or files of embeddings, or both."""

    file: Path | None
    scale: float
    embeddings: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        return [*self.embeddings, *([self.file] if self.file else [])]


def find(text: str) -> Adapter:
    """`path` or `path:scale`, of a folder or file; UserError where there is no safetensors file."""
    try:
        return _find(text)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"adapters={shown(text)}: {error.strerror or error}") from None


def _find(text: str) -> Adapter:
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
    found = _in_folder(Path(path)) if Path(path).is_dir() else [_file(Path(path))]
    loras = [file for file in found if _word(file) is None]
    if not loras and scale != 1:
        raise UserError(
            f"adapters={text}: an embedding has no scale, its word is in the prompt or not; give "
            f"adapters={path}"
        )
    if len(loras) > 1:
        raise UserError(f"adapters={path}: {loras[-1].name} is no embedding; name one file")
    words = tuple(file for file in found if file not in loras)
    return Adapter(loras[0] if loras else None, scale, words)


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"adapters={path}: no such file or folder")
    if path.suffix != ".safetensors":
        raise UserError(
            f"adapters={path} is not a .safetensors file. Pickles can run code when loaded and are "
            "refused; convert it to safetensors"
        )
    return path


def _in_folder(path: Path) -> list[Path]:
    """A LoRA at the most, and any number of embeddings."""
    standard = [*path.glob(LORA), *sorted(path.glob(_EMBEDDINGS))]
    files = standard or sorted(path.glob("*.safetensors"))
    if standard or len(files) == 1:
        return files
    if files:
        raise UserError(f"adapters={path} has {len(files)} .safetensors files; name one of them")
    if (path / "adapter").is_dir():
        raise UserError(f"adapters={path} is a run; its adapter is {path / 'adapter'}")
    raise UserError(f"adapters={path} has no {LORA} or learned_embeds.safetensors")


def _word(file: Path) -> tuple[str, tuple[int, ...]] | None:
    """The word of an embedding and its shape; None for a file of something else."""
    tensors = header(file)
    ((name, shape),) = tensors.items() if len(tensors) == 1 else [("", ())]
    if not name or len(shape) > 2 or not shape or name.endswith((".weight", ".bias", ".alpha")):
        return None
    if lora_file.is_kohya(tensors):
        return None
    return (file.stem if name == EMBEDDING else name), shape


def check(adapters: Sequence[Adapter], base: Shapes, words: Collection[str] = ()) -> None:
    """Raises UserError unless every layer the adapters change is one of the base's, in shape too,
    their new words are new, and they were trained alike.

    base: from `folder_shapes` or `pipeline_shapes`. words: those of the base's tokenizer.
    """
    known = set(words)
    for adapter in adapters:
        for file in adapter.embeddings:
            known |= _check_embedding(file, base, known)
        if adapter.file is not None:
            _check(adapter.file, base)
    trained_with(adapters)


def _check_embedding(file: Path, base: Shapes, words: set[str]) -> set[str]:
    """The words that are known with it."""
    found = _word(file)
    assert found is not None
    token, shape = found
    width = next((s[1] for name, s in base.items() if name.endswith("token_embedding")), None)
    if shape[-1] != width:
        raise UserError(
            f"{file} is an embedding of {of_width(shape[-1])}, the base is "
            f"{of_width(width)}; use the base it was trained on"
        )
    if known := words & set(embedding_names(token, 2)):
        raise UserError(
            f"{file} is for the word {shown(token)}, and {' and '.join(sorted(known))} is in the "
            "vocabulary already, of the base or of an embedding before it"
        )
    return set(embedding_names(token, shape[0] if len(shape) > 1 else 1))


def _check(file: Path, base: Shapes) -> None:
    found = read_header(file)
    adapter_settings.read(file, found.metadata)
    tensors = {name: entry.shape for name, entry in found.tensors.items()}
    layers = _layers(tensors)
    if tensors.keys() == {"clip_l", "clip_g"}:
        raise UserError(f"{file} is an embedding of Stable Diffusion XL, which the base is not")
    if layers:
        _check_family(file, layers, base)
    refuse_variants(file, tensors)
    if not layers:
        raise UserError(
            f"{file} holds no LoRA (no lora_A/lora_B or lora_down/lora_up weights), and no "
            "embedding (one tensor, of rows)"
        )
    for name, (inputs, outputs) in layers.items():
        shape = base.get(name)
        if shape is None or inputs not in (None, shape[1]) or outputs not in (None, shape[0]):
            has = f"has {shape[1]} -> {shape[0]}" if shape else "has no such layer"
            raise UserError(
                f"{file} does not fit the base: it changes {shown(name)} ({inputs} -> {outputs}), "
                f"the base {has}. Use the base it was trained on"
            )
    if lora_file.is_kohya(tensors):
        lora_file.layers(file)


def header(file: Path) -> Shapes:
    """Names and shapes of a safetensors file's tensors, without reading them. Raises UserError."""
    return {name: entry.shape for name, entry in read_header(file).tensors.items()}


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
        (f"{part}.{name}.weight", tuple(module.weight.shape))
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipeline, part).named_modules()
        # A quantised layer's is no parameter.
        if getattr(module, "weight", None) is not None
    )


def _changeable(named: Iterable[tuple[str, tuple[int, ...]]]) -> Shapes:
    return {
        spelled(key.removesuffix(".weight")): shape
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
        name = spelled(match["module"])
        inputs, outputs = layers.get(name, (None, None))
        down = match["side"] in ("A", "down")
        layers[name] = (shape[1], outputs) if down else (inputs, shape[0])
    return layers


def _check_family(file: Path, layers: Layers, base: Shapes) -> None:
    """Names the family where the width of the text gives it away."""
    ours = _text_width((name, shape[1]) for name, shape in base.items())
    theirs = _text_width((name, inputs) for name, (inputs, _) in layers.items())
    if any(name.startswith(("text_encoder_2_", "te2_")) for name in layers):
        theirs = 2048
    if theirs is not None and theirs != ours:
        raise UserError(
            f"{file} is an adapter of {of_width(theirs)}, the base is {of_width(ours)}; use the "
            "base it was trained on"
        )


def _text_width(layers: Iterable[tuple[str, int | None]]) -> int | None:
    return next((size for name, size in layers if tells_text_width(name) and size), None)


def apply(pipeline: Any, adapters: Sequence[Adapter]) -> None:
    """Loads checked adapters, all active together, each at its scale; the pipeline samples as they
    were trained."""
    check_prediction(adapters, pipeline.scheduler.config.prediction_type)
    for words in (file for adapter in adapters for file in adapter.embeddings):
        how = {"weight_name": words.name, "token": (_word(words) or ("",))[0]}
        _load(words, pipeline.load_textual_inversion, str(words.parent), **how)
    loras = [adapter for adapter in adapters if adapter.file is not None]
    names = [f"adapter_{index}" for index in range(len(loras))]
    base = pipeline_shapes(pipeline)
    for name, file in zip(names, [adapter.file for adapter in loras], strict=True):
        assert file is not None
        if lora_file.is_kohya(header(file)):
            _load_kohya(pipeline, file, base, name)
        else:
            how = {"weight_name": file.name, "adapter_name": name}
            _load(file, pipeline.load_lora_weights, str(file.parent), **how)
    if names:
        pipeline.set_adapters(names, [adapter.scale for adapter in loras])
    adopt_scheduler(pipeline, trained_with(adapters))


def _load_kohya(pipeline: Any, file: Path, base: Shapes, name: str) -> None:
    """By way of diffusers' own format: its reading of kohya's leaves out DoRA's magnitudes, and
    gives attention one strength where the alphas differ."""
    from train import kohya

    tensors, settings, _ = kohya.to_diffusers(file, base_shapes=base)
    for part in ("unet", "text_encoder"):
        if f"{part}.r" in settings:
            _load(
                file,
                getattr(pipeline, f"load_lora_into_{part}"),
                tensors,
                network_alphas=None,
                metadata=settings,
                adapter_name=name,
                low_cpu_mem_usage=True,
                _pipeline=pipeline,
                **{part: getattr(pipeline, part)},
            )


def _load(file: Path, load: Any, *what: Any, **how: Any) -> None:
    try:
        load(*what, **how)
    except Exception as error:  # what fits by name and shape can still be odd in any way
        raise UserError(f"{file} could not be applied: {shown(str(error))}") from None


def trained_with(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What their own scheduler/scheduler_config.json, or else their metadata, say of how they were
    trained, where they say it. Raises UserError where they disagree."""
    found: dict[str, Any] = {}
    for folder, scheduler in _schedulers(adapters).items():
        for key, default in _TRAINED_WITH.items():
            value = scheduler.get(key, default)
            if found.setdefault(key, value) != value:
                raise UserError(
                    f"adapters={folder} was trained with {key}={value}, another of them with "
                    f"{found[key]}: they cannot be used together"
                )
    return found


def _schedulers(adapters: Sequence[Adapter]) -> dict[Path, dict[str, Any]]:
    """What is told beside an adapter, by its folder, or else within it, by the file."""
    found: dict[Path, dict[str, Any]] = {}
    for file in dict.fromkeys(file for adapter in adapters for file in adapter.files):
        beside = file.parent / "scheduler" / "scheduler_config.json"
        if beside.is_file():
            found[file.parent] = read_json(beside, "")
        elif within := adapter_settings.scheduler(read_header(file).metadata):
            found[file] = within
    return found


def check_prediction(adapters: Sequence[Adapter], prediction_type: str) -> None:
    """Raises UserError for an adapter of a base that predicts something else than this one, as far
    as its own scheduler/scheduler_config.json or our metadata says; prints a note where kohya's
    does, which may be wrong."""
    told = _schedulers(adapters)
    for place, scheduler in told.items():
        base = scheduler.get(BASE_PREDICTION, prediction_type)
        if base != prediction_type:
            raise UserError(
                f"adapters={place} was trained on a base that predicts {base}, and this one "
                f"predicts {prediction_type}: use the base it was trained on"
            )
    for file in (adapter.file for adapter in adapters if adapter.file is not None):
        version = read_header(file).metadata.get("ss_base_model_version", "")
        base = _VERSIONS.get(version, prediction_type)
        if base != prediction_type and not {file, file.parent} & told.keys():
            _note(
                f"{file} says that its base predicts {base} ({version}); this one predicts "
                f"{prediction_type}"
            )


def _note(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", flush=True)


def adopt_scheduler(pipeline: Any, wanted: dict[str, Any]) -> None:
    """Samples as `trained_with` says where the base's scheduler differs, and says so."""
    from train.models import reschedule

    config = pipeline.scheduler.config
    different = {k: v for k, v in wanted.items() if config.get(k, _TRAINED_WITH[k]) != v}
    if different:
        said = ", ".join(f"{key}={value}" for key, value in different.items())
        _note(f"sampled with {said}, as was trained")
    settings = DiffusionConfig(
        prediction_type=different.get("prediction_type"),
        zero_terminal_snr=different.get("rescale_betas_zero_snr", False),
    )
    pipeline.scheduler = reschedule(pipeline.scheduler, settings)
