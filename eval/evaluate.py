"""Is the fine-tuned model any good? Pictures, numbers and a report of a finished run.

    accelerate launch eval/evaluate.py run=runs/NAME [key=value ...]
    python eval/evaluate.py run=runs/NAME evaluation.images=64

Generates the same prompts with the same seeds from the base and the fine-tuned model, compares both
with held-out pictures (FID) and with the prompts (CLIP score), and writes into runs/NAME/eval:
metrics.json, report.html, base/*.png and finetuned/*.png. Repeated, it keeps every picture that
would come out the same. Keys are those of runs/NAME/config.yaml, above all:
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import write_atomically
from eval.inputs import find_result, held_out, read_run, split
from train import adapter_file
from train.config import EvaluationConfig, RunConfig, command, fields

if TYPE_CHECKING:
    import numpy as np

    from data.records import Record

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Task:
    """One picture to make, by the base and the fine-tuned model alike."""

    prompt: str
    seed: int
    size: Size


def main(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return
    from train.families import check_text_to_image
    from train.models import inspect

    run, overrides = split(arguments)
    config = read_run(run, overrides)
    check_text_to_image(inspect(config.model), "this command")
    result = find_result(run)
    records = held_out(config.evaluation)
    buckets = _buckets(config)
    state, pipeline = _load_base(config)
    metrics = evaluate(
        pipeline,
        result,
        records,
        folder=run / "eval",
        buckets=buckets,
        **config.evaluation.model_dump(exclude={"path"}),
        rank=state.process_index,
        world=state.num_processes,
        wait=state.wait_for_everyone,
    )
    if metrics:
        from train.report import write as write_run_report

        write_run_report(run)
        _print_summary(metrics, run / "eval" / "report.html")
    state.destroy_process_group()


def evaluate(
    pipeline: Any,
    result: Path,
    records: Sequence[Record],
    *,
    folder: Path,
    buckets: Sequence[Size],
    clip: str,
    images: int,
    steps: int,
    guidance: float,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Generate, score and report; the metrics on process 0, None on the others.

    `pipeline`: the base, which has the adapter loaded afterwards; `result`: the folder of an
    adapter or of a whole fine-tuned pipeline; `records`: held-out pictures, which give the prompts
    and, at their bucket's size, the reference. The rest is as in EvaluationConfig.
    """
    tasks = plan(records, images=images, buckets=buckets, seed=seed)
    how = {"steps": steps, "guidance": guidance, "batch_size": batch_size}
    share = {"rank": rank, "world": world}
    base = _generate(pipeline, tasks, folder / "base", **how, **share)
    finetuned_pipeline = apply(result, pipeline)
    finetuned = _generate(finetuned_pipeline, tasks, folder / "finetuned", **how, **share)
    wait()
    if rank:
        return None
    metrics = measure(
        tasks, base, finetuned, records, buckets=buckets, clip=clip, device=pipeline.device
    )
    metrics["settings"] = _settings(finetuned_pipeline, result) | how | {"seed": seed}
    write(metrics, folder, records=records, buckets=buckets)
    return metrics


def plan(
    records: Sequence[Record], *, images: int, buckets: Sequence[Size], seed: int
) -> list[Task]:
    """Task k has seed + k; records are spread evenly, or repeated where there are too few."""
    from data.buckets import assign

    stride = max(1.0, len(records) / images)
    chosen = [records[int(k * stride) % len(records)] for k in range(images)]
    return [
        Task(record.captions[0], seed + k, assign(record.width, record.height, buckets))
        for k, record in enumerate(chosen)
    ]


def apply(result: Path, pipeline: Any) -> Any:
    """The fine-tuned pipeline: the base with the adapter loaded, or the one in the folder."""
    if not (result / "model_index.json").is_file():
        adapter = adapter_file.find(str(result))
        words = pipeline.tokenizer.get_vocab()
        adapter_file.check([adapter], adapter_file.pipeline_shapes(pipeline), words)
        adapter_file.apply(pipeline, [adapter])
        return pipeline
    from train.models import load_pipeline

    finetuned: Any = load_pipeline(str(result), dtype=pipeline.dtype)
    return finetuned.to(pipeline.device)


def measure(
    tasks: Sequence[Task],
    base: Sequence[Path],
    finetuned: Sequence[Path],
    records: Sequence[Record],
    *,
    buckets: Sequence[Size],
    clip: str,
    device: Any,
) -> dict[str, Any]:
    """All numbers of metrics.json, from the pictures of both models and the held-out ones."""
    from eval.features import load_extractor
    from eval.scoring import nearest, score, verdict, warnings

    extractor = load_extractor(clip, device=device)
    prompts = [task.prompt for task in tasks]
    reference = extractor.images(fitted(record, buckets) for record in records)
    before, after = extractor.images(base), extractor.images(finetuned)
    captions = [record.captions[0] for record in records]
    scores, cosines = score(reference, before, after, extractor.texts(prompts), prompts, captions)
    closest = nearest(after, reference)
    samples = [
        asdict(task)
        | {"base": {"file": f"base/{base[k].name}", "cosine": cosines[k][0]}}
        | {"finetuned": {"file": f"finetuned/{finetuned[k].name}", "cosine": cosines[k][1]}}
        | {"nearest": {"id": records[closest[k][0]].id, "cosine": closest[k][1]}}
        for k, task in enumerate(tasks)
    ]
    return {
        "verdict": verdict(scores),
        **scores,
        "warnings": warnings(scores, cut_prompts=extractor.count_cut(prompts)),
        "extractor": extractor.describe(),
        "reference": {"pictures": len(records), "sha256": _hash(records)},
        "samples": samples,
    }


def fitted(record: Record, buckets: Sequence[Size]) -> np.ndarray:
    """A held-out picture as training would see it: uint8 (H, W, 3) of its bucket's size."""
    from data.buckets import assign
    from data.images import fit, open_image

    size = assign(record.width, record.height, buckets)
    return fit(open_image(io.BytesIO(record.read()), cover=size), size)


def write(
    metrics: dict[str, Any], folder: Path, *, records: Sequence[Record], buckets: Sequence[Size]
) -> None:
    """metrics.json and report.html, each whole or not at all."""
    from eval.presentation import present

    by_id = {record.id: record for record in records}
    content = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "metrics.json", content.encode("utf-8"))
    present(metrics, folder, lambda sample: fitted(by_id[sample["nearest"]["id"]], buckets))


def usage() -> str:
    lines = [
        f"  evaluation.{name}  ({'required' if field.default is None else field.default})\n"
        f"      {field.description}"
        for name, field in fields(EvaluationConfig)
    ]
    return "\n".join([(__doc__ or "").strip(), "", *lines])


def _buckets(config: RunConfig) -> list[Size]:
    from data.buckets import make_buckets

    data = config.data
    return make_buckets(
        data.resolutions[-1], step=data.bucket_step, min_side=data.min_side, max_side=data.max_side
    )


def _load_base(config: RunConfig) -> tuple[Any, Any]:
    """The process's place among the others, and the base pipeline on its device."""
    from eval.processes import join, quieten
    from train.models import dtype_of, load_pipeline

    quieten()
    state = join()
    dtype = dtype_of("no" if state.device.type == "cpu" else config.train.mixed_precision)
    model = config.model
    pipeline: Any = load_pipeline(
        model.path, revision=model.revision, config=model.config, dtype=dtype
    )
    return state, pipeline.to(state.device)


def _generate(pipeline: Any, tasks: Sequence[Task], folder: Path, **how: Any) -> list[Path]:
    from eval.generation import generate

    return generate(
        pipeline,
        [task.prompt for task in tasks],
        seeds=[task.seed for task in tasks],
        size=[task.size for task in tasks],
        folder=folder,
        label=folder.name,
        **how,
    )


def _settings(pipeline: Any, result: Path) -> dict[str, Any]:
    from eval.generation import scheduler_settings

    return {
        "result": result.name,
        "scheduler": scheduler_settings(pipeline),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "device": pipeline.device.type,
    }


def _hash(records: Sequence[Record]) -> str:
    return hashlib.sha256("".join(sorted(r.sha256 for r in records)).encode()).hexdigest()


def _print_summary(metrics: dict[str, Any], report: Path) -> None:
    from eval.presentation import console, score_table

    print(f"\n{console(score_table(metrics))}\n\n{metrics['verdict']}")
    for warning in metrics["warnings"]:
        print(f"note: {warning}")
    print(f"\n{report}")


if __name__ == "__main__":
    command(main)
