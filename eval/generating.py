"""Makes the pictures of an evaluation, arm by arm: the base's, then those of what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.arms import Plan, Task, is_of_base
from train import adapter_file
from train.config import EvaluationConfig, UserError

if TYPE_CHECKING:
    from eval.inputs import Given


def make(
    pipeline: Any,
    result: Path,
    plan: Plan,
    folder: Path,
    settings: EvaluationConfig,
    *,
    given: Given,
    rank: int = 0,
    world: int = 1,
) -> tuple[dict[str, list[Path]], Any]:
    """Every arm's pictures, FOLDER/ARM/00000.png, and the fine-tuned pipeline.

    pipeline: the base, which has the adapter loaded afterwards; result: the folder of an adapter or
    of a whole fine-tuned pipeline. This process's share of the pictures is there on return.
    """
    how: dict[str, Any] = {"settings": settings, "rank": rank, "world": world}
    arms, made = plan.arms(), dict[str, list[Path]]()
    for arm in filter(is_of_base, arms):
        made[arm] = generate_arm(pipeline, arms[arm], folder / arm, label=arm, **how)
    finetuned = apply(result, pipeline)
    for arm in arms:
        if not is_of_base(arm):
            made[arm] = generate_arm(finetuned, arms[arm], folder / arm, label=arm, **how)
    if plan.scales and not rescale(finetuned, 1.0):
        given.notes.append("What was trained is no LoRA, so there is no scale to sweep.")
        return made, finetuned
    for scale, arm in plan.sweep().items():
        rescale(finetuned, scale)
        made[arm] = generate_arm(finetuned, plan.swept, folder / arm, label=arm, **how)
    rescale(finetuned, 1.0)
    return made, finetuned


def generate_arm(
    pipeline: Any,
    tasks: Sequence[Task],
    folder: Path,
    settings: EvaluationConfig,
    *,
    rank: int,
    world: int,
    label: str,
) -> list[Path]:
    """One arm's pictures, FOLDER/00000.png and so on. Raises UserError for one that cannot be
    made."""
    from eval.generation import NotFinite, generate

    try:
        return generate(
            pipeline,
            [task.prompt for task in tasks],
            seeds=[task.seed for task in tasks],
            size=[task.size for task in tasks],
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=settings.batch_size,
            folder=folder,
            rank=rank,
            world=world,
            label=label,
        )
    except NotFinite as error:
        raise UserError(
            f"{label}: {error.what}. What was trained has diverged, its scale is too large, or "
            "train.mixed_precision=fp16 does not suit it; look at the run's previews and loss"
        ) from None


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


def rescale(pipeline: Any, scale: float) -> bool:
    """Sets how strongly the adapters act; False where there is none."""
    names = [name for names in pipeline.get_list_adapters().values() for name in names]
    if not names:
        return False
    names = list(dict.fromkeys(names))
    pipeline.set_adapters(names, [scale] * len(names))
    return True
