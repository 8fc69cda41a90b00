"""What an exported file says of itself in its header: kohya's `ss_*` and `sshs_*`, which web UIs
show, Stability's ModelSpec 1.0.1 (`modelspec.*`), and this project's own record (`sd_atelier`).

All values are text, as kohya has them: "8", "1.0", "True", "None" for what is off, JSON for what
is a mapping. What is not known is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import lora_file
from train.adapter_file import BASE_PREDICTION, EMBEDDING
from train.adapter_settings import OURS, scheduler
from train.config import EvaluationConfig, ModelConfig, UserError
from train.lora_file import FileLayer
from train.run_record import Run, read_json
from train.safetensors_file import (
    MAX_HEADER_BYTES,
    end_of_header,
    read_header,
    safetensors_content,
    write_safetensors,
)
from train.training_metadata import of_data, of_training, times

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {768: "SD 1", 1024: "SD 2"}  # by the width of the text
_VERSIONS = {"SD 1": "v1", "SD 2": "v2"}
_PREDICTIONS = {"sd_v1": "epsilon", "sd_v2": "epsilon", "sd_v2_v": "v_prediction"}
_SPECIAL = {"depth": "-depth", "inpainting": "-inpainting"}
_TAGS = "ss_tag_frequency"
_HASHES = 512  # bytes that the hashes take of a header, at the most
_LOCAL = ("diffusers folder", "single file")
# The settings that are paths on this machine, or may be: a list of them in `images`.
_PATHS = {"path", "class_path", "cache", "output", "start_from", "config", "images"}
_PATHS |= {"clip", "features", "dino", "protocol"}
_HUB = "hf:"  # how the hub's data sets are written in data.path
_DEFAULTS = (ModelConfig().path, EvaluationConfig().clip)  # hub ids
_LEGACY = slice(0x100000, 0x110000)  # what web UIs once hashed of a file


def of(file: Path | None, run: Path | None, *, name: str, kind: str) -> dict[str, str]:
    """The metadata of an export called `name`, without the hashes, which `write` adds. A model's
    architecture and prediction type are left to its folder (train/ldm_settings.py).

    kind: "lora", "textual-inversion" or "model", as ModelSpec calls adapters. file: the adapter's,
    as it was trained; run: its run directory. Without a run it is what the
    file itself says. Raises UserError for an adapter that cannot be read.
    """
    about = About.of(file, run, name, kind)
    before = about.before if run is None else {}
    known = {**_of_base(about), **_of_network(about), **_of_run(about), **_spec(about)}
    return {**before, "ss_output_name": name, **known}


def of_run(run: Path, file: Path, kind: str) -> dict[str, str]:
    """The same, called as the run directory is."""
    return of(file, run, name=run.absolute().name, kind=kind)


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[str]:
    """Writes a safetensors file with its hashes in its metadata: `sshs_model_hash` and
    `modelspec.hash_sha256` of the bytes after the header, and kohya's `sshs_legacy_hash`.

    Where its header would be too large to be read back, the frequencies of the tags are left out.
    Returns what should be known of that. Raises UserError where it is too large without them.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = safetensors_content(tensors, training)
    rest = {key: value for key, value in metadata.items() if key not in training}
    if end_of_header(content) + len(json.dumps(rest)) + _HASHES > MAX_HEADER_BYTES:
        if _TAGS not in metadata:
            raise UserError(
                f"{file}: its metadata would be over {MAX_HEADER_BYTES >> 20} MB, and no reader "
                "take it: shorten what the run's configuration and manifest.json say"
            )
        fewer = {key: value for key, value in metadata.items() if key != _TAGS}
        return [
            f"{_TAGS} is left out, as the header would be too large",
            *write(file, tensors, fewer),
        ]
    sha256 = hashlib.sha256(memoryview(content)[end_of_header(content) :]).hexdigest()
    hashes = {
        "sshs_model_hash": sha256,
        # Of the file as it would be with the training's metadata alone, which nobody edits.
        "sshs_legacy_hash": hashlib.sha256(content[_LEGACY]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{sha256}",
    }
    write_safetensors(file, tensors, {**metadata, **hashes})
    return []


@dataclass(frozen=True)
class About:
    """What is exported, and all that is known of it."""

    name: str
    kind: str
    file: Path | None
    run: Run | None
    layers: Mapping[str, FileLayer]
    """Of a LoRA."""
    before: Mapping[str, str]
    """The file's own metadata."""
    scheduler: Mapping[str, Any]
    """What it was trained to be sampled with."""

    @classmethod
    def of(cls, file: Path | None, run: Path | None, name: str, kind: str) -> About:
        folder = file.parent if file is not None else run / "full" if run is not None else None
        beside = read_json(folder / "scheduler" / "scheduler_config.json") if folder else {}
        within = scheduler(read_header(file).metadata) if file is not None else {}
        return cls(
            name,
            kind,
            file,
            Run.read(run, {}) if run is not None else None,
            lora_file.layers(file) if file is not None and kind == "lora" else {},
            _own_metadata(file) if file is not None else {},
            beside or within,
        )

    @cached_property
    def base(self) -> Mapping[str, Any]:
        """What the run's manifest says of its base."""
        found = self.run.manifest.get("base") if self.run else None
        return found if isinstance(found, dict) else {}

    @property
    def family(self) -> str | None:
        """ "SD 1", "SD 2", "SD 2 depth"..."""
        told = str(self.base.get("family"))
        return told if told[:4] in _VERSIONS else _NAMES.get(self._text_width or 0)

    @property
    def _text_width(self) -> int | None:
        if self.kind == "textual-inversion" and self.file is not None:
            (entry, *_) = read_header(self.file).tensors.values()
            return entry.shape[-1]
        widths = (
            layer.shape[1]
            for name, layer in self.layers.items()
            if lora_file.tells_text_width(lora_file.spelled(name))
        )
        return next(widths, None)

    @property
    def prediction(self) -> str | None:
        """What it predicts: "epsilon", "v_prediction"..."""
        told = (
            self.setting("diffusion.prediction_type"),
            self.scheduler.get("prediction_type"),
            self.base.get("prediction_type"),
            _PREDICTIONS.get(self.before.get("ss_base_model_version", "")),
        )
        return next((str(one) for one in told if one), None)

    def setting(self, key: str) -> Any:
        return self.run.setting(key) if self.run else None


def _own_metadata(file: Path) -> dict[str, str]:
    """What of a file's metadata still holds when it is written anew."""
    known = read_header(file).metadata
    return {
        key: value
        for key, value in known.items()
        if key == OURS or (key.startswith(("ss_", "modelspec.")) and not key.endswith("sha256"))
    }


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as kohya writes them: mappings as JSON, all else as Python prints it."""
    return {
        key: json.dumps(value) if isinstance(value, dict) else str(value)
        for key, value in values.items()
    }


def _of_base(about: About) -> dict[str, str]:
    family = about.family
    if family is None:
        return {}
    is_second = family.startswith("SD 2")
    found: dict[str, Any] = {"ss_v2": is_second}
    if about.prediction or not is_second:
        v = "_v" if is_second and about.prediction == "v_prediction" else ""
        found["ss_base_model_version"] = f"sd_{_VERSIONS[family[:4]]}{v}"
    path = about.base.get("path")
    if path:
        found["ss_sd_model_name"] = name_of_path(path, hubs=hub_ids(about.base))
        found |= _file_hashes(Path(path)) if about.base.get("kind") in (None, _LOCAL[1]) else {}
    return as_text(found)


def _file_hashes(path: Path) -> dict[str, str]:
    """Of a base that is one file, as web UIs know it by."""
    if not path.is_file():
        return {}
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.seek(_LEGACY.start)
        legacy = hashlib.sha256(stream.read(_LEGACY.stop - _LEGACY.start)).hexdigest()[:8]
    return {"ss_sd_model_hash": legacy, "ss_new_sd_model_hash": sha256}


def _of_network(about: About) -> dict[str, str]:
    """Of a LoRA: its rank and alpha, and those of its convolutions where they are its own."""
    if not about.layers:
        return {}
    kernels = {n: layer for n, layer in about.layers.items() if max(layer.shape[2:], default=1) > 1}
    usual = _usual(about.layers.keys() - kernels.keys() or kernels.keys(), about.layers)
    arguments: dict[str, str] = {}
    if any(layer.dora for layer in about.layers.values()):
        arguments |= {"algo": "lora", "dora_wd": "True"}
    if kernels:
        of_kernels = _usual(kernels.keys(), about.layers)
        arguments |= {"conv_dim": str(of_kernels[0]), "conv_alpha": str(of_kernels[1])}
    found: dict[str, Any] = {
        "ss_network_module": "lycoris.kohya" if "dora_wd" in arguments else "networks.lora",
        "ss_network_dim": usual[0],
        "ss_network_alpha": usual[1],
        "ss_network_args": arguments,
    }
    if about.run is not None:
        found["ss_network_dropout"] = about.setting("lora.dropout") or None
    return as_text(found)


def _usual(names: Any, layers: Mapping[str, FileLayer]) -> tuple[int, float]:
    """The rank and alpha that most of the layers have."""
    found = sorted((layers[name].rank, layers[name].alpha) for name in names)
    return max(found, key=found.count)


def _of_run(about: About) -> dict[str, str]:
    if about.run is None:
        return {}
    own = {
        "manifest": about.run.manifest,
        "config": about.run.settings,
        "scheduler": {
            key: about.scheduler[key]
            for key in ("prediction_type", "rescale_betas_zero_snr", BASE_PREDICTION)
            if key in about.scheduler
        },
    }
    return as_text(
        {
            **of_training(about.run, about.file),
            **of_data(about.run),
            OURS: without_folders(own, about.run),
        }
    )


def without_folders(value: Any, run: Run) -> Any:
    """A record to be published: of paths on this machine only the names."""
    hubs = hub_ids(run.manifest.get("base"))
    paths = sorted(_paths(run.settings), key=len, reverse=True)
    local = {path: name for path in paths if (name := name_of_path(path, hubs=hubs)) != path}
    return _published(value, local, hubs)


def _published(value: Any, local: Mapping[str, str], hubs: Collection[str], key: str = "") -> Any:
    """key: what the value is called in the record. local: names of paths in the configuration."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "recognised"}
        return {k: _published(v, local, hubs, str(k)) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        return [_published(item, local, hubs, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in _PATHS:
        return name_of_path(value, hubs=hubs)
    if key == "changes":  # like "data.path: 'here/a' -> 'there/b'", of settings that are no more
        value = re.sub(r"(?<=')[^']*[/\\][^']*(?=')", partial(_name_in, hubs=hubs), value)
    for path, name in local.items():
        value = re.sub(
            rf"(?<![\w./\\-]){re.escape(path)}(?![\w-])", name.replace("\\", r"\\"), value
        )
    return re.sub(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])*(?=[^\s/\\])", "", value)


def _name_in(match: re.Match[str], *, hubs: Collection[str]) -> str:
    return name_of_path(match[0], hubs=hubs)


def name_of_path(path: str, *, hubs: Collection[str]) -> str:
    """A path's last component, unless it is one of the hub's ids or data sets."""
    if path in hubs or path.startswith(_HUB):
        return path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def hub_ids(base: Any) -> set[str]:
    """Which paths are none: our defaults, and the base where it was on the hub when it was trained
    on. base: as the manifest has it."""
    base = base if isinstance(base, dict) else {}
    path, kind = str(base.get("path")), base.get("kind")
    found = {*_DEFAULTS, path} if kind == "hub id" else {*_DEFAULTS}
    if kind in _LOCAL:
        found.discard(path)
    return {one for one in found if not one.endswith(".safetensors")}


def _paths(settings: Any, key: str = "") -> set[str]:
    """The paths in a configuration."""
    if isinstance(settings, dict):
        return set().union(*(_paths(value, str(k)) for k, value in settings.items()))
    if isinstance(settings, list):
        return set().union(*(_paths(value, key) for value in settings))
    is_path = isinstance(settings, str) and (
        (key in _PATHS and bool(re.search(r"\w[/\\]", settings)))
        or (Path(settings).is_absolute() and len(settings) > 1)
    )
    return {settings} if is_path else set()


def _spec(about: About) -> dict[str, str]:
    """ModelSpec's keys."""
    sides = about.setting("data.resolution") or about.base.get("resolution")
    side = max(sides) if isinstance(sides, list) else sides
    shift = (about.setting("diffusion.min_timestep"), about.setting("diffusion.max_timestep"))
    last = about.base.get("timesteps", 1000) - 1
    found = {
        "sai_model_spec": "1.0.1",
        # Whose names the tensors have: a textual inversion's are Stability's.
        "implementation": "diffusers"
        if about.kind == "lora"
        else "https://github.com/Stability-AI/generative-models",
        "title": about.name,
        "resolution": f"{side}x{side}" if side else None,
        "date": _date(about),
        "trigger_phrase": _trigger(about),
        "timestep_range": f"{shift[0] or 0},{shift[1] or last}" if any(shift) else None,
        "implementation_version": _version(about),
        **_of_architecture(about),
    }
    return {f"modelspec.{key}": str(value) for key, value in found.items() if value}


def _of_architecture(about: About) -> dict[str, str | None]:
    if about.kind == "model":
        return {}
    return {
        "architecture": _architecture(about) or about.before.get("modelspec.architecture"),
        "prediction_type": {"v_prediction": "v"}.get(str(about.prediction), about.prediction),
    }


def _architecture(about: About) -> str | None:
    """ModelSpec's name of the base, and what it is that is for it."""
    family = about.family
    if family is None:
        return None
    version, special = _VERSIONS[family[:4]], _SPECIAL.get(family[5:], "")
    if version == "v2" and not special:
        if about.prediction is None:
            return None
        special = "-768-v" if about.prediction == "v_prediction" else "-512"
    return f"stable-diffusion-{version}{special}/{about.kind}"


def _date(about: About) -> str | None:
    """When training ended, to the second (ISO 8601)."""
    ended = times(about.run, about.file)[1] if about.run else None
    return datetime.fromtimestamp(int(ended), UTC).isoformat() if ended else None


def _trigger(about: About) -> str | None:
    """What a prompt must hold."""
    if about.kind == "textual-inversion" and about.file is not None:
        (word, *_) = read_header(about.file).tensors
        return about.name if word == EMBEDDING else word
    trigger = about.setting("data.captions.trigger")
    return str(trigger) if trigger else None


def _version(about: About) -> str | None:
    version = about.run.manifest.get("sd_atelier") if about.run else None
    return f"sd-atelier/{version}" if version else None
