"""Exports the result of a run for the programs that people generate with.

    python scripts/export.py run=runs/toy-lora format=kohya output=toy.safetensors
    python scripts/export.py run=runs/toy-lora format=merged scale=0.8 output=toy-merged
    python scripts/export.py run=runs/toy-lora format=single_file precision=fp16
    python scripts/export.py run=runs/toy-lora format=diffusers push_to_hub=me/toy-lora

`diffusers` is what the run itself writes, `kohya` is for AUTOMATIC1111, Forge and ComfyUI, `merged`
is a whole pipeline with the adapter in its weights, `single_file` the same as one file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from eval.sampling import spelled_out
from scripts.exporting import formats, hub, placing, results
from train import screens
from train.config import ModelConfig, Section, UserError, command, load

WITH_BASE = ("merged", "single_file")
FILES = ("kohya", "single_file")


class BaseConfig(ModelConfig):
    path: str = ""
    """The base for `merged` and `single_file` (also model=PATH); default: the run's own."""


class ExportConfig(Section):
    """The result of a run in a format of other programs (scripts/export.py)."""

    run: Path | None = None
    """A finished run's directory; or `adapter`."""
    adapter: str | None = None
    """A LoRA's or embedding's folder or .safetensors file, without a run."""
    format: Literal["diffusers", "kohya", "merged", "single_file"] = "diffusers"
    """What is written: see docs/export.md."""
    output: Path | None = None
    """A .safetensors file for `kohya` and `single_file`, else a folder; default: in RUN/export."""
    overwrite: bool = False
    """Whether an earlier export at `output` is replaced."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of the weights that are written."""
    scale: float = Field(1.0, allow_inf_nan=False)
    """How strongly the adapter acts in `merged` and `single_file`."""
    model: BaseConfig = BaseConfig()
    name: str | None = None
    """What it is called in metadata and card; default: as the run's directory."""
    card: bool = True
    """Whether a model card with sample pictures, data and metrics is written beside it."""
    push_to_hub: str | None = None
    """NAMESPACE/NAME of the Hugging Face repository that it is uploaded to."""
    private: bool = True
    """Whether a repository that is made for it is private."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.run is None) == (self.adapter is None):
            raise ValueError("give one of run=RUN_DIRECTORY or adapter=FILE_OR_FOLDER")
        if self.run is None and self.output is None:
            raise ValueError("adapter= needs output=")
        return self


def main(arguments: list[str]) -> None:
    config = load(ExportConfig, [spelled_out(argument) for argument in arguments])
    result = result_of(config)
    output = output_of(config, result)
    if config.push_to_hub:
        hub.check(config.push_to_hub)

    with screens.working(f"writing {output}"):
        written = formats.export(
            result,
            config.format,
            output,
            precision=config.precision,
            scale=config.scale,
            card=config.card,
            overwrite=config.overwrite,
        )
    for warning in written.warnings:
        print(f"warning: {warning}", flush=True)
    print(f"wrote {', and beside it '.join(filter(None, [str(output), beside(output, written)]))}")
    if config.push_to_hub:
        print(f"pushed {hub.push(written.files, config.push_to_hub, private=config.private)}")
    screens.done(output, format=config.format, warnings=list(written.warnings))


def beside(output: Path, written: formats.Export) -> str:
    """What an export of one file has put around it: a card and its pictures."""
    if not output.is_file():
        return ""
    paths = [path.relative_to(output.parent) for path in written.files.values()]
    return ", ".join(sorted({path.parts[0] for path in paths} - {output.name}))


def result_of(config: ExportConfig) -> results.Result:
    """What is to be exported, checked against the format. Raises UserError."""
    if config.run is not None:
        result = results.of_run(config.run)
    else:
        result = results.of_adapter(str(config.adapter))
    result = result.named(config.name).on(config.model if config.model.path else None)
    if config.scale != 1 and (result.is_model or config.format not in WITH_BASE):
        raise UserError(
            f"scale={config.scale}: in format={config.format} it is chosen when generating; "
            f"format={' or '.join(WITH_BASE)} of an adapter takes it"
        )
    if config.format == "kohya":
        _check_kohya(result)
    elif config.format in WITH_BASE and result.base is None and not result.is_model:
        raise UserError(f"format={config.format} needs the base: give model=FOLDER_OR_FILE")
    return result


def _check_kohya(result: results.Result) -> None:
    if result.is_model:
        raise UserError(
            f"run={result.run} is a whole model, and kohya's format is of adapters: use "
            "format=single_file for AUTOMATIC1111 and ComfyUI"
        )
    if len(result.adapters) > 1:
        raise UserError(
            f"{result.folder} holds {len(result.adapters)} files, and kohya's format takes each "
            f"by itself: give adapter={result.adapters[0]} and so on"
        )


def output_of(config: ExportConfig, result: results.Result) -> Path:
    """Where it is written to. Raises UserError where something is there, or it cannot be."""
    is_file = config.format in FILES
    if config.output is not None:
        output = config.output
    else:
        assert result.run is not None
        ending = {"kohya": ".safetensors", "single_file": "-model.safetensors"}
        name = result.run.resolve().name + ending.get(config.format, f"-{config.format}")
        output = result.run / "export" / name
    if is_file and output.suffix != ".safetensors":
        raise UserError(f"output={output}: format={config.format} is a file, NAME.safetensors")
    if not is_file and output.suffix == ".safetensors":
        raise UserError(f"output={output}: format={config.format} is a folder")
    inside = (folder for folder in result.folders if _is_within(output, folder))
    if folder := next(inside, None):
        raise UserError(f"output={output} lies in {folder}, which is exported from: choose another")
    placing.check(output, config.format, overwrite=config.overwrite)
    return output


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


if __name__ == "__main__":
    command(main)
