"""How well the toy base follows prompts, judged by the checker; and how well the checker judges.

python scripts/toy/measure.py            # pictures and measures.json in runs/toy-measure
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from train.config import Section, command, load

if TYPE_CHECKING:
    from scripts.toy.checker import Checker

FRESH_SEED, PROMPT_SEED = 101, 102  # worlds that no recipe trained on


class MeasureConfig(Section):
    """Measures the toy base (scripts/toy/measure.py)."""

    model: str = "data/assets/toy-base"
    """The base to measure."""
    checker: Path = Path("data/assets/toy-checker")
    """The judge."""
    output: Path = Path("runs/toy-measure")
    """Folder of the pictures and of measures.json."""
    prompts: int = Field(256, ge=1)
    """Held-out prompts, one picture each."""
    renders: int = Field(2000, ge=1)
    """Fresh renders that the checker itself is tested on."""
    steps: int = Field(25, ge=1)
    """Sampling steps."""
    guidance: float = Field(3.0, ge=0)
    """Classifier-free guidance scale."""
    batch_size: int = Field(32, ge=1)
    """Pictures generated at once."""


def main(arguments: list[str]) -> None:
    config = load(MeasureConfig, arguments)
    from data import toy
    from scripts.toy.checker import load_checker

    checker = load_checker(config.checker)
    fresh = [toy.sample_scene(FRESH_SEED, index) for index in range(config.renders)]
    renders = [toy.render(scene, 128, 128) for scene in fresh]
    wanted = [toy.sample_scene(PROMPT_SEED, index) for index in range(config.prompts)]
    pictures = _generate([toy.caption(scene) for scene in wanted], config)
    measures = {
        "settings": config.model_dump(mode="json"),
        "checker on fresh renders": rates(checker, renders, fresh),
        "base on held-out prompts": rates(checker, pictures, wanted),
    }
    path = config.output / "measures.json"
    path.write_text(json.dumps(measures, indent=1) + "\n", encoding="utf-8")
    print(table(measures))


def rates(checker: Checker, pictures: Sequence[Any], scenes: Sequence[Any]) -> dict[str, Any]:
    """Share right of each attribute and of all at once, with 95 % intervals."""
    import numpy as np

    from eval.significance import share

    read = [
        reading
        for start in range(0, len(pictures), 64)
        for reading in checker.read(list(pictures[start : start + 64]))
    ]
    pairs = list(zip(read, scenes, strict=True))
    right = {
        name: np.array([reading[name] == getattr(scene, name) for reading, scene in pairs], float)
        for name in read[0]
    }
    right["all four"] = np.prod(list(right.values()), axis=0)
    return {name: share(values).as_dict() for name, values in right.items()}


def table(measures: dict[str, Any]) -> str:
    """A Markdown table."""
    columns = [name for name in measures if name != "settings"]
    lines = [f"| right | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for attribute in measures[columns[0]]:
        cells = [_percent(measures[column][attribute]) for column in columns]
        lines.append(f"| {attribute} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(summary: dict[str, Any]) -> str:
    return f"{summary['mean']:.1%} ({summary['low']:.1%} to {summary['high']:.1%})"


def _generate(prompts: list[str], config: MeasureConfig) -> list[Any]:
    from eval.features import read_rgb
    from eval.generation import generate
    from train.models import load_pipeline

    paths = generate(
        load_pipeline(config.model),
        prompts,
        seeds=range(len(prompts)),
        steps=config.steps,
        guidance=config.guidance,
        size=(128, 128),
        batch_size=config.batch_size,
        folder=config.output / "pictures",
    )
    return [read_rgb(path) for path in paths]


if __name__ == "__main__":
    command(main)
