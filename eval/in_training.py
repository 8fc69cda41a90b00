"""Evaluation in the course of training: what `train.examination` has pictures judged by.

Light until the first picture is made: a plan uses the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from train.config import RunConfig, UserError

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from eval.arms import Plan
    from eval.embedded import Embedded, Extractors, Made
    from eval.inputs import Given
    from train.examination import Judge
    from train.method import Pipeline
    from train.pictures import Pictures

BETTER: dict[str, Literal["less", "more"]] = {
    "kid": "less",
    "cmmd": "less",
    "fid": "less",
    "clip_i": "more",
    "dino": "more",
    "clip_t": "more",
    "clip_score": "more",
}
_DISTANCES, _LIKENESSES = ("kid", "cmmd", "fid"), ("clip_i", "dino")
_REAL = ("held_out", "training")
_FEW = 50  # pictures, of which an unbiased distance is mostly chance
_OF_INCEPTION = 2048  # dimensions


@dataclass(frozen=True)
class Scoring:
    """What is made every `evaluation.every` steps and what it is held against."""

    config: RunConfig
    given: Given
    plan: Plan
    dimension: int
    """Of the features that the distances stand on."""

    @property
    def better(self) -> dict[str, Literal["less", "more"]]:
        """Every score that there will be, and which way is better."""
        lacking = self.lacking
        return {name: way for name, way in BETTER.items() if name not in lacking}

    @property
    def lacking(self) -> dict[str, str]:
        """What every other score would need."""
        given, found = self.given, dict[str, str]()
        if not given.is_of_captions:
            found |= dict.fromkeys(_DISTANCES, _CAPTIONS)
        if not all(task.described for task in self.plan.samples):
            found["clip_t"] = f"{_NAMES}, which every held-out caption names, or {_PROTOCOL}"
        if not (given.held_out or given.training):
            found |= dict.fromkeys(_LIKENESSES, "evaluation.path=FOLDER of pictures of the subject")
        if not given.subject:
            found |= dict.fromkeys(_LIKENESSES, f"{_NAMES}, or {_PROTOCOL}")
        if not self.config.evaluation.dino:
            found["dino"] = "evaluation.dino=FOLDER or hub id of a DINO"
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Of `pictures` made each time, and of the real ones that are their `reference`; and the
        features' `dimension`."""
        real, pictures = self.given.held_out or self.given.training, len(self.plan.samples)
        return {"pictures": pictures, "reference": len(real), "dimension": self.dimension}

    def check(self) -> None:
        """Raises UserError where the score that is to choose the best will not be there."""
        score = self.config.validation.score
        if score is not None and score in self.lacking:
            raise UserError(
                f"validation.metric={score} needs {self.lacking[score]}; or take one of "
                f"{', '.join(self.better)}, or validation.metric=loss"
            )

    def describe(self) -> list[str]:
        """Lines of a plan."""
        settings, steps = self.config.evaluation, self.config.train.steps
        times = 1 + -(-steps // settings.every)
        note = few(self.config.validation.score, self.counts)
        return [
            f"scores   {said(self.counts, steps=settings.steps)}, every {settings.every} steps, "
            f"{times} times: {', '.join(self.better)}",
            *([f"note     {note}"] if note else []),
        ]


_NAMES = 'evaluation.subject="zwx dog" and evaluation.noun="dog"'
_CAPTIONS = "evaluation.protocol=held_out and evaluation.path=FOLDER of captioned pictures"
_PROTOCOL = "evaluation.protocol=objects or living with them"


def prepare(config: RunConfig, trained: Pictures) -> Scoring:
    """Finds and checks all that an evaluation during training will use. Raises UserError for what
    could not be evaluated later."""
    from eval import inputs
    from eval.arms import spread

    settings = config.evaluation
    # Copies are not looked for, so pictures trained on matter only as the subject's only ones.
    without = config.model_copy(
        update={"evaluation": settings.model_copy(update={"training_images": 0})}
    )
    given = inputs.gather(without)
    if given.subject and not given.held_out:
        given = replace(given, training=spread(trained.records, settings.training_images))
    plan = inputs.plan(config, given, images=settings.quick_images)
    scoring = Scoring(config, given, plan, _dimension(config))
    scoring.check()
    return scoring


def judge(scoring: Scoring | None, accelerator: Accelerator) -> Judge | None:
    """None for a run without."""
    return LiveJudge(scoring, accelerator) if scoring is not None else None


def said(counts: Mapping[str, int], *, steps: int | None = None) -> str:
    """How many pictures, of so many sampling steps, stand against how many."""
    drawn = f" of {steps} sampling steps" if steps else ""
    against = f" against {counts['reference']} real ones" if counts.get("reference") else ""
    return f"{counts.get('pictures', 0)} pictures{drawn}{against}"


def few(metric: object, counts: Mapping[str, int]) -> str | None:
    """Why not to trust a score of so few pictures with the choice of the best, if there is a
    reason. counts: as a `Scoring` has them; what is not known of them is enough."""
    pictures, reference = (counts.get(name, _FEW) for name in ("pictures", "reference"))
    if metric == "fid":
        from eval.frechet import small_sample_warning

        warning = small_sample_warning(counts.get("dimension", 0), pictures, reference)
        return warning and f"{warning} validation.metric=kid has no such bias"
    if metric in ("kid", "cmmd") and min(pictures, reference) < _FEW:
        return (
            f"validation.metric={metric} of {said(counts)} is mostly chance: raise "
            f"evaluation.quick_images, and the pictures in evaluation.path, to {_FEW} or more"
        )
    return None


def _dimension(config: RunConfig) -> int:
    """Of evaluation.features, by its configuration alone."""
    from eval.features import find_extractor

    path = config.evaluation.features or config.evaluation.clip
    if Path(path).is_file():
        return _OF_INCEPTION
    content = json.loads((find_extractor(path) / "config.json").read_text(encoding="utf-8"))
    usual = 512 if "text_config" in content else content.get("hidden_size", 768)
    return int(content.get("projection_dim", usual))


@dataclass
class LiveJudge:
    """Generates with the live pipeline and scores as eval/evaluate.py does, without intervals."""

    scoring: Scoring
    accelerator: Accelerator
    _real: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, init=False)
    """Features of the real pictures, which are looked at once, by extractor."""

    @property
    def better(self) -> Mapping[str, Literal["less", "more"]]:
        return self.scoring.better

    @property
    def counts(self) -> Mapping[str, int]:
        return self.scoring.counts

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
            self.scoring.plan.samples,
            folder,
            self.scoring.config.evaluation,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            label="pictures to score",
        )

    def _scored(self, made: Made) -> dict[str, float]:
        """In every process alike: nothing here may wait for the others."""
        from eval.embedded import Extractors
        from eval.measuring import Evidence, quick_scores

        plan, given = self.scoring.plan, self.scoring.given
        # Loaded anew each time: between two evaluations the memory is training's.
        extractors = Extractors.load(self.scoring.config.evaluation, self.accelerator.device)
        embedded = self._embedded(made, extractors)
        found = quick_scores(Evidence(plan, made, given, embedded, extractors))
        return {name: found[name] for name in self.better if name in found}

    def _embedded(self, made: Made, extractors: Extractors) -> Embedded:
        from eval.embedded import embed
        from eval.features import extract

        given, cache = self.scoring.given, self.scoring.config.data.cache / "features"
        if self._real:
            given = replace(given, held_out=[], training=[])
        found = embed(
            self.scoring.plan, made, given, extractors, extract=partial(extract, cache=cache)
        )
        self._real = self._real or {
            name: {which: rows for which, rows in arms.items() if which in _REAL}
            for name, arms in found.pictures.items()
        }
        pictures = {name: {**self._real[name], **arms} for name, arms in found.pictures.items()}
        return replace(found, pictures=pictures)
