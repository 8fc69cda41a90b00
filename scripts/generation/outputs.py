"""The folder that pictures are written to: what it holds already is not lost without being asked
for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from eval.generation import KEY
from scripts.generation import sheet
from scripts.generation.config import GenerateConfig
from scripts.generation.inputs import Source
from train.config import UserError, dump, read_yaml

_REMEDY = "choose another output=, or replace it with overwrite=true"


def files(config: GenerateConfig, count: int) -> list[Path]:
    """Where so many pictures go."""
    return [config.output / f"{index:05d}.png" for index in range(count)]


def check(config: GenerateConfig, sources: Iterable[Source], count: int) -> None:
    """Makes the folder, before anything heavy is loaded.

    Raises UserError where one of `count` pictures would replace what it is made from, and where
    the folder cannot be used, is something else's, a run's say, or was begun with another negative
    prompt.
    """
    file = config.output / "config.yaml"
    _check_inputs(config, sources, count)
    try:
        negative = _negative_prompt(file) if file.exists() else config.negative_prompt
        if negative is None or (negative != config.negative_prompt and not config.overwrite):
            raise UserError(
                f"output={config.output} holds a config.yaml of another negative_prompt, or not of "
                "this script; choose another output="
            )
        config.output.mkdir(parents=True, exist_ok=True)
        if not os.access(config.output, os.W_OK):
            raise UserError(f"output={config.output} cannot be used (it is not writable)")
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None


def claim(config: GenerateConfig, paths: Sequence[Path], wanted: Sequence[dict[str, Any]]) -> None:
    """Writes output/config.yaml, which repeats the command.

    Raises UserError, and writes nothing, where a picture is there that was made with other
    settings than those `wanted`, or that nothing says is ours. Of ours, what is damaged is made
    again, and so is what is no picture at all.
    """
    if not config.overwrite:
        for path, settings in zip(paths, wanted, strict=True):
            _check_picture(path, settings)
        if config.grid:
            _check_picture(config.output / sheet.NAME, None)
    try:
        again = config.model_copy(update={"overwrite": False})
        (config.output / "config.yaml").write_text(dump(again), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None


def by_the_first(state: Any, work: Callable[[], None]) -> None:
    """Has the main process work. The UserError that it raises is raised in all: none of them draws
    for a command that is refused."""
    from eval.processes import gather

    refusal = None
    if state.is_main_process:
        try:
            work()
        except UserError as error:
            refusal = str(error)
    if said := [text for text in gather(refusal) if text is not None]:
        raise UserError(said[0])


def _check_inputs(config: GenerateConfig, sources: Iterable[Source], count: int) -> None:
    made = [*files(config, count), *([config.output / sheet.NAME] if config.grid else [])]
    there = {os.path.realpath(path): path for path in made}
    for source in sources:
        given = {"image": source.image, "mask": source.mask, "depth": source.depth}
        pairs = [*given.items(), *(("control_image", file) for file in source.controls)]
        for key, file in pairs:
            if file is not None and (path := there.get(os.path.realpath(file))):
                raise UserError(
                    f"{key}={file} would be replaced by the picture {path}: choose another output="
                )


def _check_picture(path: Path, wanted: dict[str, Any] | None) -> None:
    """None stands for any settings."""
    try:
        with Image.open(path) as image:
            said = image.info.get(KEY)  # stands before the pixels, and is there of a torn file too
            ours = json.loads(said) if said else None
            if ours is not None and (wanted is None or ours == wanted):
                return
            if ours is not None:
                image.load()
    except (OSError, SyntaxError, ValueError):
        return  # absent or damaged
    except Image.DecompressionBombError:
        ours = None
    why = "does not say that this script made it"
    if ours is not None and wanted is not None:
        keys = sorted(key for key in {*ours, *wanted} if ours.get(key) != wanted.get(key))
        why = f"was made with other settings ({', '.join(keys)})"
    raise UserError(f"{path} is there and {why}: {_REMEDY}")


def _negative_prompt(file: Path) -> str | None:
    try:
        return read_yaml(file).get("negative_prompt")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return None
