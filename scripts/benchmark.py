"""Measures speed and memory on this machine, and prints a table and JSON.

    python scripts/benchmark.py data
    python scripts/benchmark.py data quick=true output=benchmark.json
    python scripts/benchmark.py data parts='[decode, reading]'
    python scripts/benchmark.py train
    python scripts/benchmark.py train model=full resolution=768 precision=bf16 rank=16
    python scripts/benchmark.py train parts='[speed]' against='{compile: blocks}'
    python scripts/benchmark.py eval
    python scripts/benchmark.py checkpoint
    python scripts/benchmark.py generate
    python scripts/benchmark.py plan base=my/full-size
    python scripts/benchmark.py watermark

What is compared is measured in one run, in turns. The tables are those in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from scripts.benchmarks.train_setting import TrainSetting
from train import screens
from train.config import Section, UserError, command, load

DataPart = Literal["decode", "planning", "reading", "memory", "edit", "caching"]
TrainPart = Literal["speed", "reference", "memory", "python"]
MetricsPart = Literal["streaming", "frechet", "intervals", "pairs"]
CheckpointPart = Literal["writing", "training"]
GeneratePart = Literal["pictures", "batches"]
WatermarkPart = Literal["drawn", "textured"]


class DataBenchmark(Section):
    """Decoding, planning, reading and building of datasets (scripts/benchmark.py data)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A tenth or less of the work: figures to try it out, not to quote."""
    parts: list[DataPart] = ["decode", "planning", "reading", "memory", "edit", "caching"]
    """What to measure."""
    scratch: Path | None = None
    """Folder for some GiB of files made and removed; default: the system's own."""


class TrainBenchmark(TrainSetting):
    """The training loop: its speed, and against what it is held (scripts/benchmark.py train)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A few steps: figures to try it out, not to quote."""
    parts: list[TrainPart] = ["speed", "reference", "memory", "python"]
    """What to measure: speed; reference, a published recipe on the same model, in turns with it;
    memory, in a process of its own; python, a step of a model of one number."""
    scratch: Path | None = None
    """Folder for base models, pictures and checkpoints made and removed; default: the system's
    own."""
    steps: int = Field(8, ge=1)
    """Optimizer steps in a round, besides 3 that do not count."""
    rounds: int = Field(9, ge=1)
    """Rounds, besides one that does not count."""
    against: dict[str, Any] | None = None
    """What differs in another setting that is measured in turns with this one, like {rank: 64}."""


class EvalBenchmark(Section):
    """Distances between sets of features, on one thread (scripts/benchmark.py eval)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A tenth or less of the work: figures to try it out, not to quote."""
    parts: list[MetricsPart] = ["streaming", "frechet", "intervals", "pairs"]
    """What to measure."""


class CheckpointBenchmark(Section):
    """Writing of checkpoints, and what training loses by it (scripts/benchmark.py checkpoint)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A tenth or less of the work: figures to try it out, not to quote."""
    parts: list[CheckpointPart] = ["writing", "training"]
    """What to measure."""
    scratch: Path | None = None
    """Folder for some GiB of files made and removed; default: the system's own."""


class GenerateBenchmark(Section):
    """How fast pictures are made (scripts/benchmark.py generate)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A tenth or less of the work: figures to try it out, not to quote."""
    parts: list[GeneratePart] = ["pictures", "batches"]
    """What to measure: where the time of a picture goes, and what batches save."""
    model: str = "data/assets/toy-base"
    """The base, as for scripts/generate.py."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """As train.mixed_precision."""
    side: int | None = Field(None, ge=64, multiple_of=8)
    """Of the pictures, in pixels; default: the model's own."""


class PlanBenchmark(Section):
    """How far scripts/plan.py is off, on the CPU (scripts/benchmark.py plan)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """One setting alone."""
    settings: list[str] = []
    """Which of its settings, by the names in the table; default: all."""
    base: Path | None = None
    """What scripts/toy/full_size.py wrote, for the settings of the full size; without it only the
    toy base's are measured."""
    scratch: Path | None = None
    """Folder for runs made and removed; default: the system's own."""


class WatermarkBenchmark(Section):
    """What the invisible watermark survives (scripts/benchmark.py watermark)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A tenth or less of the work: figures to try it out, not to quote."""
    parts: list[WatermarkPart] = ["drawn", "textured"]
    """Which pictures."""


def main(arguments: list[str]) -> None:
    task, *rest = arguments or [""]
    if task in {"--help", "-h"}:
        print((__doc__ or "").strip())
    elif task == "data":
        data(load(DataBenchmark, rest))
    elif task == "train":
        train(load(TrainBenchmark, rest))
    elif task == "eval":
        evaluation(load(EvalBenchmark, rest))
    elif task == "checkpoint":
        checkpoint(load(CheckpointBenchmark, rest))
    elif task == "plan":
        plan(load(PlanBenchmark, rest))
    elif task == "generate":
        generate(load(GenerateBenchmark, rest))
    elif task == "watermark":
        watermark(load(WatermarkBenchmark, rest))
    else:
        named = "train, data, eval, checkpoint, generate, plan or watermark"
        remedy = f"python scripts/benchmark.py {named}"
        raise UserError(f"say what to measure, and not {task!r}: {remedy}")


def data(config: DataBenchmark) -> None:
    from scripts.benchmarks import data_benchmark

    scale = data_benchmark.QUICK if config.quick else data_benchmark.FULL
    results = data_benchmark.measure(config.parts, scale, scratch=config.scratch)
    report(results, data_benchmark.table(results), config)


def train(config: TrainBenchmark) -> None:
    from scripts.benchmarks import train_benchmark, train_table

    own = config.model_dump(include=set(TrainSetting.model_fields))
    results = train_benchmark.measure(
        TrainSetting(**own),
        config.parts,
        against=config.against,
        steps=2 if config.quick else config.steps,
        rounds=2 if config.quick else config.rounds,
        scratch=config.scratch,
    )
    report(results, train_table.table(results), config)


def evaluation(config: EvalBenchmark) -> None:
    from scripts.benchmarks import metrics_benchmark

    scale = metrics_benchmark.QUICK if config.quick else metrics_benchmark.FULL
    results = metrics_benchmark.measure(config.parts, scale)
    report(results, metrics_benchmark.table(results), config)


def checkpoint(config: CheckpointBenchmark) -> None:
    from scripts.benchmarks import checkpoint_benchmark

    scale = checkpoint_benchmark.QUICK if config.quick else checkpoint_benchmark.FULL
    results = checkpoint_benchmark.measure(config.parts, scale, scratch=config.scratch)
    report(results, checkpoint_benchmark.table(results), config)


def plan(config: PlanBenchmark) -> None:
    from scripts.benchmarks import plan_benchmark

    unknown = [name for name in config.settings if name not in plan_benchmark.SETTINGS]
    if unknown:
        known = "; ".join(plan_benchmark.SETTINGS)
        raise UserError(f"settings: {unknown[0]!r} is none of {known}")
    names = config.settings or list(plan_benchmark.SETTINGS)[: 1 if config.quick else None]
    results = plan_benchmark.measure(names, full_size=config.base, scratch=config.scratch)
    report(results, plan_benchmark.table(results), config)


def generate(config: GenerateBenchmark) -> None:
    from scripts.benchmarks import generate_benchmark

    scale = generate_benchmark.QUICK if config.quick else generate_benchmark.FULL
    how: dict[str, Any] = {"precision": config.precision, "side": config.side}
    results = generate_benchmark.measure(config.parts, scale, model=config.model, **how)
    report(results, generate_benchmark.table(results), config)


def watermark(config: WatermarkBenchmark) -> None:
    from scripts.benchmarks import watermark_benchmark

    scale = watermark_benchmark.QUICK if config.quick else watermark_benchmark.FULL
    results = watermark_benchmark.measure(config.parts, scale)
    report(results, watermark_benchmark.table(results), config)


def report(
    results: dict[str, Any],
    table: str,
    config: Any,
) -> None:
    """Print the figures as JSON and as the table, and write the JSON to config.output."""
    from scripts.benchmarks import measuring

    figures = measuring.environment(sys.argv) | {"quick": config.quick, "results": results}
    text = json.dumps(figures, indent=2)
    print(f"{text}\n\n{measuring.described(figures)}\n\n{table}")
    if config.output:
        try:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            config.output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={config.output} cannot be written ({error})") from None
    screens.done(config.output, results=results)


if __name__ == "__main__":
    command(main)
