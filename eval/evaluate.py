"""Is the fine-tuned model any good, and how sure is that? Pictures, numbers and a report.

    accelerate launch eval/evaluate.py run=runs/NAME [key=value ...]
    python eval/evaluate.py run=runs/NAME evaluation.protocol=living
    python eval/evaluate.py images=DIR reference=DIR [output=DIR] [key=value ...]

Generates the same prompts with the same seeds from the base and the fine-tuned model, measures both
and the baselines, and writes into runs/NAME/eval: metrics.json, scores.csv, samples.csv,
report.html and the pictures. Repeated, it keeps every picture that would come out the same, and
its numbers are the same, with any number of processes. Two folders of pictures are measured against
each other without a run. Keys are those of runs/NAME/config.yaml, above all:
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import forget_unfinished, write_atomically
from eval import inputs
from eval.figures import settled
from eval.outputs import writing_to
from train import screens
from train.config import EvaluationConfig, RunConfig, command, fields

if TYPE_CHECKING:
    from eval.inputs import Given


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return
    if any(text.startswith(("images=", "reference=")) for text in arguments):
        from eval.folders import compare_folders

        compare_folders(arguments)
        return
    from train.families import check_text_to_image
    from train.models import inspect

    run, overrides = inputs.split(arguments)
    config = inputs.read_run(run, overrides)
    check_text_to_image(inspect(config.model), "this command")
    result = inputs.find_result(run)
    given = inputs.gather(config)
    _say_beforehand(run, given)
    with writing_to(run / "eval"):
        metrics = evaluate(config, run, result, given)
        if metrics:
            from train.report import write as write_run_report
            from train.tracking import add_scores

            write(metrics, run / "eval", given)
            write_run_report(run)
            add_scores(run, config.model_dump(mode="json"), config.tracking, metrics)
            _print_summary(metrics, run / "eval" / "report.html")


def evaluate(config: RunConfig, run: Path, result: Path, given: Given) -> dict[str, Any] | None:
    """Generates and measures; the content of metrics.json on process 0, None on the others."""
    from eval.curves import of_checkpoints
    from eval.embedded import Extractors, embed
    from eval.features import extract
    from eval.generating import make
    from eval.measuring import Evidence, measure
    from eval.processes import gather, join, one_thread

    state, settings = join(), config.evaluation
    one_thread(state.device)
    share: dict[str, Any] = {"rank": state.process_index, "world": state.num_processes}
    plan = inputs.plan(config, given)
    with screens.working(f"loading {config.model.path}"):
        base = _load_base(config, state.device)
    if state.is_main_process:
        # It must never stand beside pictures that it is not of.
        (run / "eval" / "metrics.json").unlink(missing_ok=True)
    made, finetuned = make(base, result, plan, run / "eval", settings, given=given, **share)
    state.wait_for_everyone()
    if state.is_main_process:
        forget_unfinished(run / "eval")
    extractors = Extractors.load(settings, state.device)
    cache = config.data.cache / "features"
    embedded = embed(
        plan,
        made,
        given,
        extractors,
        extract=lambda each, pictures: extract(each, pictures, cache=cache, gather=gather, **share),
    )
    metrics: dict[str, Any] | None = None
    if state.is_main_process:
        with screens.working("intervals and tests"):
            evidence = Evidence(plan, made, given, embedded, extractors)
            metrics = measure(evidence, seed=settings.seed)
        metrics["title"] = run.absolute().name
        metrics["curves"]["checkpoints"] = of_checkpoints(run / "eval/steps")
        metrics["settings"] = _settings(config, finetuned, result, given)
    state.destroy_process_group()
    return settled(metrics)


def write(metrics: dict[str, Any], folder: Path, given: Given) -> None:
    """metrics.json, the tables and report.html, each whole or not at all."""
    from eval.embedded import fitted
    from eval.presentation import present
    from eval.tables import write_csv

    records = {"training": given.training, "held_out": given.held_out}
    by_id = {(kind, record.id): record for kind, found in records.items() for record in found}
    content = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "metrics.json", content.encode("utf-8"))
    write_csv(metrics, folder)
    present(
        metrics,
        folder,
        lambda kind, id: fitted(by_id[kind, id], given.buckets) if (kind, id) in by_id else None,
    )


def usage() -> str:
    lines = [
        f"  evaluation.{name}  ({field.default})\n      {field.description}"
        for name, field in fields(EvaluationConfig)
    ]
    return "\n".join([(__doc__ or "").strip(), "", *lines])


def _say_beforehand(run: Path, given: Given) -> None:
    """What is better known before the pictures are made."""
    if os.environ.get("RANK", "0") != "0":
        return
    for note in given.notes:
        print(f"note: {note}")
    try:
        before = json.loads((run / "eval" / "metrics.json").read_text("utf-8"))
        protocol = before["settings"]["protocol"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if protocol != given.name:
        print(f"note: this replaces the run's evaluation with evaluation.protocol={protocol}")


def _load_base(config: RunConfig, device: Any) -> Any:
    from eval.processes import quieten
    from train.models import dtype_of, load_pipeline

    quieten()
    dtype = dtype_of("no" if device.type == "cpu" else config.train.mixed_precision)
    model = config.model
    pipeline: Any = load_pipeline(
        model.path, revision=model.revision, config=model.config, dtype=dtype
    )
    return pipeline.to(device)


def _settings(config: RunConfig, pipeline: Any, result: Path, given: Given) -> dict[str, Any]:
    from eval.generation import scheduler_settings, weights

    chosen = ("steps", "guidance", "batch_size", "seed", "images", "per_prompt", "resize")
    return {
        "protocol": given.name,
        "subject": given.subject,
        "noun": given.noun,
        **config.evaluation.model_dump(include=set(chosen)),
        "result": result.name,
        "weights": weights(pipeline),
        "scheduler": scheduler_settings(pipeline),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
    }


def _print_summary(metrics: dict[str, Any], report: Path) -> None:
    from eval.presentation import console

    word = {"keep": "Keep it", "unclear": "In doubt", "leave": "Leave it"}[metrics["keep"]]
    print(f"\n{console(metrics)}\n\n{word}: {metrics['verdict']}")
    for warning in metrics["warnings"]:
        print(f"note: {warning}")
    by_class = [s["title"] for s in metrics["scores"].values() if s["against"] == "base_class"]
    if by_class:
        print(f"change: from the base with the class's words for {', '.join(by_class)}")
    print(f"\n{report}")
    screens.done(report, keep=metrics["keep"], verdict=metrics["verdict"])


if __name__ == "__main__":
    command(main)
