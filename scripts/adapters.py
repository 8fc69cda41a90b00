"""What adapters are, how they differ, and new ones made of them: LoRA files, diffusers' or kohya's.

    python scripts/adapters.py inspect runs/toy-lora/adapter base=data/assets/toy-base
    python scripts/adapters.py compare one.safetensors other.safetensors
    python scripts/adapters.py merge style.safetensors:0.7 subject:0.5 output=both
    python scripts/adapters.py merge a.safetensors b.safetensors rank=16 output=both.safetensors \
        format=kohya
    python scripts/adapters.py resize big.safetensors rank=8 output=small
    python scripts/adapters.py resize big.safetensors energy=0.95 output=small
    python scripts/adapters.py extract tuned=runs/toy-full/full base=data/assets/toy-base rank=32 \
        output=extracted

Each answers --help. Adapters are `path` or `path:scale`. What is written is read again, and its
error is that of the file: the norm of what it differs by from what was asked for, over the norm of
that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from train import screens
from train.config import ModelConfig, Section, UserError, command, load

Part = Literal["unet", "text_encoder"]
S = TypeVar("S", bound=Section)


class _OnBase(Section):
    base: str | None = None
    """The base model: a diffusers folder or a single .safetensors file. DoRA's changes depend on
    it."""
    base_config: str | None = None
    """For a single file: a diffusers folder with the configuration of its family."""


class InspectConfig(_OnBase):
    """What a LoRA file is (scripts/adapters.py inspect FILE)."""

    adapter: str
    """A LoRA's folder or .safetensors file."""
    format: Literal["table", "json"] = "table"
    """JSON has every layer by itself."""


class _Several(_OnBase):
    adapters: list[str]
    """LoRA folders or .safetensors files, each `path` or `path:scale`."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class CompareConfig(_Several):
    """How two LoRA files differ (scripts/adapters.py compare FILE FILE)."""

    format: Literal["table", "json"] = "table"
    """JSON has every layer by itself."""

    @model_validator(mode="after")
    def _two(self) -> Self:
        if len(self.adapters) != 2:
            raise ValueError(f"adapters: give two to compare, not {len(self.adapters)}")
        return self


class _Written(Section):
    output: Path
    """A folder, or for format=kohya a .safetensors file."""
    overwrite: bool = False
    """Whether a LoRA that is at `output` is replaced, as a whole. A folder with anything else in it
    is left alone."""
    format: Literal["diffusers", "kohya"] = "diffusers"
    """Whose format it is written in."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the numbers that are written."""
    rank: int | None = Field(None, ge=1)
    """Of each layer, at the most."""
    conv_rank: int | None = Field(None, ge=0)
    """Of convolutions larger than 1x1, if another; 0 leaves them out."""
    energy: float | None = Field(None, gt=0, le=1)
    """Share of the squared singular values of each layer that is kept at the least, in as few ranks
    as that takes."""

    @model_validator(mode="after")
    def _fits_its_format(self) -> Self:
        if (self.output.suffix == ".safetensors") != (self.format == "kohya"):
            kind = "a file, NAME.safetensors" if self.format == "kohya" else "a folder"
            raise ValueError(f"output={self.output}: format={self.format} is {kind}")
        if self.conv_rank is not None and self.rank is None and self.energy is None:
            raise ValueError("conv_rank= needs rank= or energy=, for all other layers")
        return self


class MergeConfig(_Several, _Written):
    """The weighted sum of LoRA files (scripts/adapters.py merge FILE:SCALE FILE:SCALE output=...):
    exact, its rank the sum of theirs, or with rank= or energy= the nearest of that size."""


class ResizeConfig(_OnBase, _Written):
    """A LoRA of lower rank (scripts/adapters.py resize FILE rank=8 output=...)."""

    adapter: str
    """A LoRA's folder or .safetensors file."""

    @model_validator(mode="after")
    def _to_what(self) -> Self:
        if self.rank is None and self.energy is None:
            raise ValueError("give rank=, energy= or both")
        return self


class ExtractConfig(_Written):
    """The LoRA nearest to a full fine-tune (scripts/adapters.py extract)."""

    tuned: str
    """The fine-tuned model: a diffusers folder or a single .safetensors file."""
    base: str
    """The model it was fine-tuned from, likewise."""
    base_config: str | None = None
    """For single files: a diffusers folder with the configuration of their family."""
    parts: list[Part] = Field(["unet", "text_encoder"], min_length=1)
    """Of the model; what was not trained is left out by itself."""

    @model_validator(mode="after")
    def _to_what(self) -> Self:
        if self.rank is None and self.energy is None:
            raise ValueError(
                "give rank=, energy= or both; rank=100000 keeps everything, in a file up to twice "
                "as large as the model"
            )
        return self


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    if task in {"--help", "-h"}:
        print((__doc__ or "").strip())
    elif task in _TASKS:
        _TASKS[task](rest)
    else:
        import difflib

        near = difflib.get_close_matches(task, _TASKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(_TASKS)}"
        raise UserError(f"python scripts/adapters.py TASK: {task!r} is none, {hint}")


def inspect(arguments: list[str]) -> None:
    from train import adapter_report, adapter_tables

    config = _read(InspectConfig, arguments, "adapter")
    file, _ = _lora(config.adapter)
    found = adapter_report.inspect(file, _layers(config))
    print(_text(found, config.format, adapter_tables.inspected))
    screens.done(file, found=found)


def compare(arguments: list[str]) -> None:
    from train import adapter_report, adapter_tables

    config = _read(CompareConfig, arguments, "adapters")
    files, sources = _sources(config.adapters, config)
    found = adapter_report.compare(files, [_scaled(*source) for source in sources])
    print(_text(found, config.format, adapter_tables.compared))
    screens.done(compared=found)


def merge(arguments: list[str]) -> None:
    config = _read(MergeConfig, arguments, "adapters")
    _check_output(config)
    files, sources = _sources(config.adapters, config, exact=_size(config).whole)
    _make(sources, config, files)


def resize(arguments: list[str]) -> None:
    config = _read(ResizeConfig, arguments, "adapter")
    _check_output(config)
    files, sources = _sources([config.adapter], config)
    _make(sources, config, files)


def extract(arguments: list[str]) -> None:
    from data.files import progress
    from train import adapter_editing, adapter_factors

    config = _read(ExtractConfig, arguments, None)
    _check_output(config)
    tuned = _weights(config.tuned, config.base_config, "tuned")
    base = _weights(config.base, config.base_config, "base")
    changes = adapter_editing.extracted(
        tuned, base, _size(config), parts=config.parts, progress=progress("extracting")
    )
    file = _write(
        changes,
        config,
        scheduler=_scheduler_of(config.tuned),
        base_prediction=base.prediction_type,
    )
    written = adapter_factors.read(file)
    rows = adapter_editing.extraction_errors(
        tuned, base, written, parts=config.parts, progress=progress("comparing")
    )
    _report(file, rows)
    _report_left_out(*adapter_editing.left_out(tuned, base, config.parts), rows)


_TASKS: dict[str, Callable[[list[str]], None]] = {
    "inspect": inspect,
    "compare": compare,
    "merge": merge,
    "resize": resize,
    "extract": extract,
}


# What the tasks share


def _read(schema: type[S], arguments: Sequence[str], key: str | None) -> S:
    """The configuration; arguments without `=` are of that key."""
    plain = [word for word in arguments if "=" not in word and not word.startswith("-")]
    if "--config" in arguments or not plain or key is None:
        return load(schema, arguments)
    if key == "adapter" and len(plain) > 1:
        raise UserError(f"one adapter at a time: {plain[0]}, and not {plain[1]} too")
    value = json.dumps(plain) if key == "adapters" else plain[0]
    return load(schema, [f"{key}={value}", *(word for word in arguments if word not in plain)])


def _lora(text: str) -> tuple[Path, float]:
    """The LoRA file and scale that an adapter's text means."""
    from train import adapter_file
    from train.safetensors_file import shown

    found = adapter_file.find(text)
    if found.file is None:
        raise UserError(f"{text} is of embeddings, which have no ranks; give a LoRA")
    if found.embeddings:
        names = ", ".join(shown(file.name) for file in found.embeddings)
        print(f"note: {names} beside it is not looked at, only the LoRA", file=sys.stderr)
    return found.file, found.scale


def _sources(
    texts: Sequence[str], config: _OnBase, *, exact: bool = False
) -> tuple[list[Path], list[Any]]:
    """The files of several adapters, and of each what it changes and its scale. Raises UserError
    for those of different bases, and for DoRA where all of the change is to be kept."""
    from train import adapter_factors

    layers = _layers(config)
    found = [_lora(text) for text in texts]
    files = [file for file, _ in found]
    read = [adapter_factors.read(file) for file in files]
    adapter_factors.check_alike(files, read)
    if exact:
        adapter_factors.check_low_rank(files, read)
    changes = [adapter_factors.plain(f, one, layers) for f, one in zip(files, read, strict=True)]
    return files, [(one, scale) for one, (_, scale) in zip(changes, found, strict=True)]


def _scaled(changes: Any, scale: float) -> Any:
    from dataclasses import replace

    from train.adapter_factors import Made

    return Made(changes, lambda _, factors: replace(factors, scale=factors.scale * scale))


def _layers(config: _OnBase) -> Any:
    """The base's layers, where one is given."""
    if config.base is None:
        return None
    return _weights(config.base, config.base_config, "base").layers


def _weights(path: str, described: str | None, key: str) -> Any:
    from train import base_weights

    return base_weights.of_model(ModelConfig(path=path, config=described), key)


def _size(config: _Written) -> Any:
    from train.adapter_editing import Size

    return Size(config.rank, config.energy, config.conv_rank)


def _make(sources: Sequence[Any], config: _Written, files: Sequence[Path]) -> None:
    """Writes the sum of sources, cut to size, and says how far the file is from it."""
    from data.files import progress
    from train import adapter_editing, adapter_factors, adapter_file

    adapter_file.trained_with([adapter_file.Adapter(file, 1.0) for file in files])
    changes = adapter_editing.merged(sources, _size(config), progress("merging"))
    folders = [adapter_factors.scheduler_beside(file) for file in files]
    file = _write(
        changes,
        config,
        before=adapter_factors.common_metadata(files),
        scheduler=next(filter(None, folders), None),
    )
    _report(file, adapter_editing.errors(sources, adapter_factors.read(file)))


def _check_output(config: _Written) -> None:
    if config.output.exists() and not config.overwrite:
        raise UserError(
            f"output={config.output} is there already: choose another, or overwrite=true"
        )
    if config.output.exists() and config.output.is_dir() != (config.format == "diffusers"):
        raise UserError(f"output={config.output} is something else: choose another")
    if config.output.exists():
        from train.adapter_factors import check_replaceable

        check_replaceable(config.output)


def _scheduler_of(model: str) -> Path | None:
    folder = Path(model) / "scheduler"
    return folder if (folder / "scheduler_config.json").is_file() else None


def _write(changes: Any, config: _Written, **more: Any) -> Path:
    """Writes what was made; `more` is as `adapter_factors.write` takes it."""
    from train import adapter_factors

    how: dict[str, Any] = {"format": config.format, "precision": config.precision}
    try:
        file, warnings = adapter_factors.write(changes, config.output, **how, **more)
    except OSError as error:
        raise UserError(f"output={config.output} cannot be written ({error})") from None
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return file


def _report(file: Path, rows: Sequence[Any]) -> None:
    from train import adapter_editing, adapter_tables

    print(adapter_tables.edited(rows))
    size = file.stat().st_size / 2**20
    error = adapter_editing.relative_error(rows)
    print(f"wrote {file} ({size:.2f} MiB); it is {error:.3g} off, as a share of the change's norm")
    screens.done(file, error=error)


def _report_left_out(count: int, norm: float, rows: Sequence[Any]) -> None:
    from train import adapter_editing

    if count:
        whole = adapter_editing.total(rows, lambda row: row.norm)
        print(
            f"not in it: the change of {count} biases, norms and embeddings, which no LoRA holds; "
            f"its norm is {norm:.3g}, that of the layers {whole:.3g}"
        )


def _text(found: Any, format: str, table: Callable[[Any], str]) -> str:
    return json.dumps(found, indent=2) if format == "json" else table(found)


if __name__ == "__main__":
    command(main)
