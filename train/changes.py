"""What is not as it was when the run began that is to be resumed: configuration, base, pictures,
number of processes.

Of three kinds. HARMLESS keys and the number of processes change how the run is done and not what
is trained: they are noted. IMPOSSIBLE ones change which parameters train, or what the optimizer
keeps of them, so that no checkpoint fits. All others, more steps too (the learning rate's course
spans them all), give another result than either run alone, and need
checkpoint.accept_changes=true.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from train.config import RunConfig, Section, TextualInversionRun, UserError
from train.families import BaseModel
from train.rundir import newest, read_manifest

HARMLESS = (
    "output",
    "data.cache",
    "data.workers",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.channels_last",
    "train.skip_non_finite",
    "dreambooth.class_batch_size",
    "checkpoint.",
    "preview.every",
    "validation.every",
    "validation.use_best",
    "tracking.",
    "evaluation.",
    "processes",
)
IMPOSSIBLE = (
    "method",
    "lora",
    "lora.rank",
    "lora.targets",
    "lora.blocks",
    "lora.dora",
    "lora.text_encoder",
    "lora.text_encoder.rank",
    "lora.text_encoder.targets",
    "full.text_encoder",
    "dreambooth.text_encoder",
    "textual_inversion.tokens",
    "optim.name",
    "optim.decay",
    "base.family",
)
_PASSING = ("dry_run", "checkpoint.accept_changes")  # of one command, not of the run
_METHODS = ("dreambooth", "textual_inversion", "full", "lora")  # a LoRA run has the last only
_DECAYS = ("optim.weight_decay", "optim.text_encoder.weight_decay")
_GROUPED = "at 0, what does not decay is no group of its own"
_COURSE = "the learning rate's schedule spans all steps, so it changes from here on"


class Change(NamedTuple):
    """One thing that differs."""

    key: str
    before: Any
    now: Any
    remark: str = ""
    fits: bool = True
    """Whether a checkpoint from before can be loaded now, as far as the values go."""

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.key}: {self.before!r} -> {self.now!r}{remark}"

    @property
    def is_harmless(self) -> bool:
        return self.key.startswith(HARMLESS)

    @property
    def is_impossible(self) -> bool:
        return self.key in IMPOSSIBLE or not self.fits


def since(config: RunConfig, base: BaseModel, dataset: Mapping[str, Any]) -> list[Change]:
    """All that can be told before the base is loaded; dataset: as the manifest has it.

    Nothing where no checkpoint binds the run directory. Raises UserError, listing everything, for
    what is impossible, and without checkpoint.accept_changes for what needs it.
    """
    step = newest(config.output)
    if step is None:
        return []
    manifest = read_manifest(config.output)
    found = [
        *_of_configuration(config),
        *_of_base(manifest.get("base") or {}, base),
        *_of_pictures(manifest.get("dataset") or {}, dataset),
        *_of_processes(manifest),
    ]
    _refuse(config, step, found)
    if config.train.steps < step:
        raise UserError(
            f"train.steps={config.train.steps} is less than the {step} that the run in "
            f"output={config.output} has done already: give more, or choose another output="
        )
    return found


def since_loaded(config: RunConfig, hashes: Mapping[str, str]) -> list[Change]:
    """What the weights tell; hashes: of each part of the base. Raises UserError as `since`."""
    step = newest(config.output)
    if step is None:
        return []
    before = (read_manifest(config.output).get("base") or {}).get("sha256") or {}
    found = list(_of_hashes(before, hashes))
    _refuse(config, step, found)
    return found


def _refuse(config: RunConfig, step: int, found: Sequence[Change]) -> None:
    impossible = [str(change) for change in found if change.is_impossible]
    others = [str(c) for c in found if not (c.is_impossible or c.is_harmless)]
    run = f"output={config.output} holds a run, {step} steps long by now,"
    if impossible:
        besides = f" Changed besides: {'; '.join(others)}." if others else ""
        raise UserError(
            f"{run} that cannot go on with {'; '.join(impossible)}: other parameters would train, "
            f"or be updated in another way.{besides} Restore what it had, or choose another output="
        )
    if others and not config.checkpoint.accept_changes:
        raise UserError(
            f"{run} of another configuration, another base or other pictures: {'; '.join(others)}. "
            "Restore what it had, or add checkpoint.accept_changes=true to go on with what is now, "
            "or choose another output="
        )


def _of_configuration(config: RunConfig) -> Iterator[Change]:
    path = config.output / "config.yaml"
    if not path.exists():
        return
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another output=") from None
    if not isinstance(old, dict):
        raise UserError(f"{path} is no configuration of a run; choose another output=")
    method, now = (next((m for m in _METHODS if m in keys), None) for keys in (old, dict(config)))
    if method not in (None, now):
        yield Change("method", method, now)
    for change in differences(old, config):
        if change.key == "train.steps" and config.optim.schedule != "constant":
            yield change._replace(remark=_COURSE)
        elif change.key in _DECAYS and 0 in change[1:3] and _trains_vectors(config):
            yield change._replace(remark=_GROUPED, fits=False)
        elif change.key not in _PASSING:
            yield change


def _trains_vectors(config: RunConfig) -> bool:
    """Whether biases, norms or DoRA's magnitudes train, which do not decay where matrices do."""
    lora = getattr(config, "lora", None)
    if lora is not None:
        return bool(lora.dora)
    return not isinstance(config, TextualInversionRun)


def differences(old: Mapping[str, Any], new: Section, prefix: str = "") -> Iterator[Change]:
    """Every dotted key that differs. What only one has came or went with a version of this program,
    but a section is as good as a value to one that can be null."""
    now = new.model_dump(mode="json")
    for name, value in new:
        if name not in old:
            continue
        if isinstance(value, Section) and isinstance(old[name], dict):
            yield from differences(old[name], value, f"{prefix}{name}.")
        elif old[name] != now[name]:
            yield Change(f"{prefix}{name}", old[name], now[name])


def _of_base(before: Mapping[str, Any], base: BaseModel) -> Iterator[Change]:
    """What its files' JSON says; its scheduler has no weights that could tell."""
    now = {
        "family": base.family.name,
        "prediction_type": base.prediction_type,
        "timesteps": base.timesteps,
    }
    for name, value in now.items():
        if before.get(name, value) != value:
            yield Change(f"base.{name}", before[name], value)


def _of_hashes(before: Mapping[str, Any], now: Mapping[str, str]) -> Iterator[Change]:
    for part, value in now.items():
        if before.get(part, value) != value:
            yield Change(f"base.{part}", before[part], value, "sha256")


def _of_pictures(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """By their hash, with what can be told of each source."""
    if before.get("sha256", now["sha256"]) == now["sha256"]:
        return
    old, new = ({s.get("name"): s for s in side.get("sources", ())} for side in (before, now))
    told = [f"no more {name}" for name in old if name not in new]
    for name, source in new.items():
        if name not in old:
            told.append(f"new: {name}")
        elif old[name].get("pictures") != source["pictures"]:
            told.append(f"{name}: {old[name].get('pictures')} pictures -> {source['pictures']}")
        elif old[name].get("sha256", source["sha256"]) != source["sha256"]:
            told.append(f"{name}: other pictures, captions or sizes, as many")
    beside = "classes" in now and all("sha256" in source for source in old.values())
    told = told or ["class pictures" if beside else "sha256"]
    yield Change("dataset", before["sha256"], now["sha256"], "; ".join(told))


def _of_processes(manifest: Mapping[str, Any]) -> Iterator[Change]:
    now = int(os.environ.get("WORLD_SIZE", "1"))
    before = manifest.get("processes", now)
    if before != now:
        yield Change("processes", before, now)
