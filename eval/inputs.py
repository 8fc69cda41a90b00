"""What an evaluation starts from: a finished run and held-out pictures, checked before models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from train.config import EvaluationConfig, RunConfig, UserError, load

if TYPE_CHECKING:
    from data.records import Record


def split(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The run directory and the overrides."""
    runs = [text.removeprefix("run=") for text in arguments if text.startswith("run=")]
    if len(runs) != 1 or not runs[0]:
        raise UserError("which run? give run=runs/NAME (once)")
    return Path(runs[0]), [text for text in arguments if not text.startswith("run=")]


def read_run(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's own configuration with overrides; whichever method trained it."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"run={run}: no config.yaml there; give the directory of a training run")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None
    sections = set(values) if isinstance(values, dict) else set()
    # The method that knows the most of its sections: several have a `lora`.
    schemas: list[type[RunConfig]] = [RunConfig, *RunConfig.__subclasses__()]
    schema = max(schemas, key=lambda schema: len(sections & schema.model_fields.keys()))
    return load(schema, ["--config", str(file), *overrides])


def find_result(run: Path) -> Path:
    """What the run trained: adapter/ or full/."""
    for result in (run / "adapter", run / "full"):
        if list(result.glob("*.safetensors")) or (result / "model_index.json").is_file():
            return result
    raise UserError(f"run={run}: neither adapter/ nor full/ there; let the training finish first")


def held_out(settings: EvaluationConfig) -> list[Record]:
    """The captioned pictures of evaluation.path; UserError where it or the CLIP cannot serve."""
    from data.sources import scan
    from eval.features import find_extractor

    if settings.path is None:
        raise UserError(
            "evaluation.path is not set: give a folder of captioned pictures the training did not "
            "see, evaluation.path=DIR"
        )
    find_extractor(settings.clip)
    try:
        records = list(scan(settings.path).table)
    except UserError as error:
        named = str(error).replace("data.path=", "evaluation.path=")
        raise UserError(
            named.replace(", or leave them out with data.on_bad_image=report", "")
        ) from None
    if len(records) < 2:
        raise UserError(f"evaluation.path={settings.path} holds {len(records)} picture; use more")
    return records
