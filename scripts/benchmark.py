"""Measures speed and memory on this machine, and prints a table and JSON.

    python scripts/benchmark.py data
    python scripts/benchmark.py data quick=true output=benchmark.json
    python scripts/benchmark.py data parts='[decode, reading]'
    python scripts/benchmark.py metrics
    python scripts/benchmark.py checkpoint
    python scripts/benchmark.py watermark

What is compared is measured in one run, in turns. The tables are those in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from train.config import Section, UserError, command, load

DataPart = Literal["decode", "planning", "reading", "memory", "edit"]
MetricsPart = Literal["streaming", "frechet", "intervals", "pairs"]
CheckpointPart = Literal["writing", "training"]
WatermarkPart = Literal["drawn", "textured"]


class DataBenchmark(Section):
    """Decoding, planning, reading and building of datasets (scripts/benchmark.py data)."""

    output: Path | None = None
    """JSON file for the figures; by default they are only printed."""
    quick: bool = False
    """A tenth or less of the work: figures to try it out, not to quote."""
    parts: list[DataPart] = ["decode", "planning", "reading", "memory", "edit"]
    """What to measure."""
    scratch: Path | None = None
    """Folder for some GiB of files made and removed; default: the system's own."""


class MetricsBenchmark(Section):
    """Distances between sets of features, on one thread (scripts/benchmark.py metrics)."""

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
    elif task == "metrics":
        metrics(load(MetricsBenchmark, rest))
    elif task == "checkpoint":
        checkpoint(load(CheckpointBenchmark, rest))
    elif task == "watermark":
        watermark(load(WatermarkBenchmark, rest))
    else:
        remedy = "python scripts/benchmark.py data, metrics, checkpoint or watermark"
        raise UserError(f"say what to measure, and not {task!r}: {remedy}")


def data(config: DataBenchmark) -> None:
    from scripts.benchmarks import data_benchmark

    scale = data_benchmark.QUICK if config.quick else data_benchmark.FULL
    results = data_benchmark.measure(config.parts, scale, scratch=config.scratch)
    report(results, data_benchmark.table(results), config)


def metrics(config: MetricsBenchmark) -> None:
    from scripts.benchmarks import metrics_benchmark

    scale = metrics_benchmark.QUICK if config.quick else metrics_benchmark.FULL
    results = metrics_benchmark.measure(config.parts, scale)
    report(results, metrics_benchmark.table(results), config)


def checkpoint(config: CheckpointBenchmark) -> None:
    from scripts.benchmarks import checkpoint_benchmark

    scale = checkpoint_benchmark.QUICK if config.quick else checkpoint_benchmark.FULL
    results = checkpoint_benchmark.measure(config.parts, scale, scratch=config.scratch)
    report(results, checkpoint_benchmark.table(results), config)


def watermark(config: WatermarkBenchmark) -> None:
    from scripts.benchmarks import watermark_benchmark

    scale = watermark_benchmark.QUICK if config.quick else watermark_benchmark.FULL
    results = watermark_benchmark.measure(config.parts, scale)
    report(results, watermark_benchmark.table(results), config)


def report(
    results: dict[str, Any],
    table: str,
    config: DataBenchmark | MetricsBenchmark | CheckpointBenchmark | WatermarkBenchmark,
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


if __name__ == "__main__":
    command(main)
