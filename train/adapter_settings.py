"""The settings of a LoRA in its file's metadata, which diffusers hands to PEFT as they stand: only
those of a plain LoRA pass, or somebody else's text would decide what is searched and made here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.config import UserError
from train.safetensors_file import shown

KEY = "lora_adapter_metadata"  # diffusers'
OURS = "sd_atelier"  # this project's record of a run, as JSON
_PARTS = ("unet", "text_encoder")
# PEFT matches these as regular expressions; a name with its dots escaped or not is all it writes.
_LAYER = re.compile(r"\^?[\w.]{1,300}(?:\\\.[\w.]{1,300}){0,20}\$?")
MAX_PATTERNS = 1000  # of one kind; SD 2.1 has some 700 layers


def read(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings by name, each with its part in front (`unet.r`); none where the file says
    nothing. Raises UserError for what is not of a plain LoRA."""
    try:
        settings = json.loads(metadata.get(KEY, "{}"))
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
        for name, value in settings.items():
            part, _, key = name.partition(".")
            if part in _PARTS and not _CHECKS.get(key, _is_plain)(value):
                raise ValueError(f"{shown(name)} is {shown(json.dumps(value))}")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} has settings in its metadata ({KEY}) that are not of a plain LoRA: {error}. "
            "Export the adapter again, or remove them from the file's metadata"
        ) from None
    return settings


def scheduler(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What this project's record says of how an adapter is to be sampled, and what its base
    predicts, in the words of a scheduler_config.json; nothing of what is no such record."""
    try:
        told = json.loads(metadata.get(OURS, "{}"))["scheduler"]
        return {key: told[key] for key, known in _SCHEDULER.items() if told.get(key) in known}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _is_plain(value: Any) -> bool:
    """Off, empty or a number: nothing that would switch something on by a name."""
    if isinstance(value, dict):
        return not any(value.values())
    return not value or isinstance(value, int | float)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _are_layers(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(name, str) and _LAYER.fullmatch(name) for name in value)
    )


def _are_patterns(value: Any) -> bool:
    if not value:
        return value is None or value == {}
    return (
        isinstance(value, dict)
        and len(value) <= MAX_PATTERNS
        and _are_layers([*value])
        and all(map(_is_number, value.values()))
    )


def _one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or value in known


_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_SCHEDULER: dict[str, tuple[Any, ...]] = {
    "prediction_type": _PREDICTIONS,
    "rescale_betas_zero_snr": (True, False),
    "_base_prediction_type": _PREDICTIONS,
}
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": _is_number,
    "lora_alpha": _is_number,
    "rank_pattern": _are_patterns,
    "alpha_pattern": _are_patterns,
    "target_modules": _are_layers,
    "exclude_modules": _are_layers,
    "peft_type": _one_of("LORA"),
    "bias": _one_of("none", "all", "lora_only"),
    "init_lora_weights": _one_of(True, False, "gaussian"),
    "megatron_core": _one_of("megatron.core"),
    # Words that nothing here acts on.
    "peft_version": lambda value: value is None or isinstance(value, str),
    "base_model_name_or_path": lambda value: value is None or isinstance(value, str),
    "task_type": lambda value: value is None or isinstance(value, str),
    "revision": lambda value: value is None or isinstance(value, str),
}
