"""Evaluation in the course of training: what `train.examination` has pictures judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from accelerate import Accelerator

    from eval.arms import Plan
    from eval.embedded import Made
    from eval.inputs import Given
    from train.config import RunConfig
    from train.examination import Judge
    from train.method import Pipeline

BETTER: dict[str, Literal["less", "more"]] = {
    "kid": "less",
    "cmmd": "less",
    "fid": "less",
    "clip_i": "more",
    "dino": "more",
    "clip_t": "more",
    "clip_score": "more",
}
_OF_DISTANCES, _OF_SUBJECTS = ("kid", "cmmd", "fid"), ("clip_i", "dino", "clip_t")


def judge(config: RunConfig, accelerator: Accelerator) -> Judge | None:
    """None for a run without. Raises UserError for what could not be evaluated later."""
    if not config.evaluation.every:
        return None
    from eval import inputs

    given = inputs.gather(config)
    plan = inputs.plan(config, given, images=config.evaluation.quick_images)
    return LiveJudge(config, accelerator, given, plan)


@dataclass(frozen=True)
class LiveJudge:
    """Generates with the live pipeline and scores as eval/evaluate.py does, without intervals."""

    config: RunConfig
    accelerator: Accelerator
    given: Given
    plan: Plan

    @property
    def better(self) -> Mapping[str, Literal["less", "more"]]:
        missing: set[str] = set()
        if self.given.protocol is not None or not self.given.held_out:
            missing |= set(_OF_DISTANCES)
        if not self.given.subject:
            missing |= set(_OF_SUBJECTS)
        if not all(task.described for task in self.plan.samples):
            missing.add("clip_t")
        if not self.config.evaluation.dino:
            missing.add("dino")
        return {name: way for name, way in BETTER.items() if name not in missing}

    def __call__(self, pipeline: Pipeline, *, folder: Path) -> Mapping[str, float]:
        import torch

        from train.examination import together

        made = {"finetuned": together(lambda: self._generate(pipeline, folder))}
        with torch.autocast(self.accelerator.device.type, enabled=False):
            return together(lambda: self._scored(made))

    def _generate(self, pipeline: Pipeline, folder: Path) -> list[Path]:
        from eval.generating import generate_arm

        return generate_arm(
            pipeline,
            self.plan.samples,
            folder,
            self.config.evaluation,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            label="pictures to score",
        )

    def _scored(self, made: Made) -> dict[str, float]:
        """In every process alike: nothing here may wait for the others."""
        from eval.embedded import Extractors, embed
        from eval.features import extract
        from eval.measuring import Evidence, quick_scores

        # Loaded anew each time: between two evaluations the memory is training's.
        extractors = Extractors.load(self.config.evaluation, self.accelerator.device)
        cache = self.config.data.cache / "features"
        embedded = embed(
            self.plan, made, self.given, extractors, extract=partial(extract, cache=cache)
        )
        found = quick_scores(Evidence(self.plan, made, self.given, embedded, extractors))
        return {name: found[name] for name in self.better if name in found}
