"""Scores of pictures made in the course of training, always of the same prompts and seeds, so that
what changes between two of them is the model.

Who makes and scores them is not known here (eval/in_training.py). Light until it runs: a report
uses the rest.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from train.config import EvaluationConfig, UserError
from train.course import Better, Course, named, read_steps, write_step

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.method import Method, Pipeline

T = TypeVar("T")

# What may change without changing the scores.
_BESIDES = {"every", "images", "training_images", "general", "scales"}


class Judge(Protocol):
    """Makes pictures and scores them."""

    @property
    def better(self) -> Mapping[str, Better]:
        """Every metric it gives, and which way is better."""

    def __call__(self, pipeline: Pipeline, *, folder: Path) -> Mapping[str, float]:
        """Pictures by `pipeline` into `folder`, which is there and empty, and their metrics.

        Called by all processes together, under the run's autocast, without gradients; process 0's
        numbers count. Random state, cuDNN's settings and the pipeline's scheduler may be changed,
        weights not. Raises what it likes, but in all processes: what can fail in one of them alone
        is to be done in `together`. All but UserError costs the step its scores, not the run.
        """


class NotExamined(RuntimeError):
    """Pictures that could not be made or scored in one of the processes; the message says why."""


@dataclass(frozen=True, eq=False)
class Examined:
    """The scores after one step."""

    step: int
    scores: Mapping[str, float]
    settings: Mapping[str, Any]
    """Of the evaluation: only scores of the same settings can be compared."""

    def value(self, metric: str) -> float:
        """nan for one that it has not."""
        return self.scores.get(metric, math.nan)

    def metrics(self) -> dict[str, float | None]:
        """As metrics.jsonl has them; None for what is not finite."""
        return {f"evaluation/{name}": value for name, value in self._finite().items()}

    def write(self, folder: Path) -> None:
        """FOLDER/step-00000100.json, whole or not at all."""
        write_step(folder, self.step, {"metrics": self._finite(), "settings": {**self.settings}})

    def _finite(self) -> dict[str, float | None]:
        return {name: v if math.isfinite(v) else None for name, v in self.scores.items()}


class Examination(Course[Examined]):
    """Has a judge make pictures and score them: OUTPUT/step-00000100/ and step-00000100.json.

    judge: None for a run without. score: the metric that chooses the best checkpoint, if one of
    these does. The rest is as for Course.

    Raises UserError for a score that the judge does not give.
    """

    def __init__(
        self,
        judge: Judge | None,
        config: EvaluationConfig,
        output: Path,
        accelerator: Accelerator,
        *,
        score: str | None = None,
        start: int,
        kept: Collection[int] = (),
    ) -> None:
        better = judge.better if judge is not None else {}
        _check(score, better, config)
        self._judge = judge
        self._settings = config.model_dump(mode="json", exclude=_BESIDES)
        known = read(output, until=start) if start else []
        super().__init__(
            [one for one in known if one.settings == self._settings],
            output,
            accelerator,
            title=score or "score",
            every=config.every if judge is not None else 0,
            metric=score or "",
            better=better.get(score or "", "less"),
            start=start,
            kept=kept,
        )

    def run(self, method: Method, done: int) -> Examined | None:
        """The scores of the method's pictures as it is, where they are due; None where they could
        not be had. A place where all processes meet."""
        pipeline = method.pipeline()
        if pipeline is None:
            return None
        try:
            folder = together(lambda: self._emptied(done))
            scores = self._scores(method, pipeline, folder)
        except NotExamined as error:
            self._say(f"warning: step {done} has no scores: {error}")
            self._discard(done)
            return None
        examined = Examined(done, scores, self._settings)
        self._add(examined)
        self._say(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        return examined

    def _scores(self, method: Method, pipeline: Pipeline, folder: Path) -> dict[str, float]:
        """Those of process 0, in every process."""
        import torch
        from accelerate.utils import broadcast_object_list
        from accelerate.utils.memory import clear_device_cache

        from train.previews import at_rest

        def judged() -> dict[str, float]:
            assert self._judge is not None
            with (
                torch.no_grad(),
                at_rest(method.model),
                unchanged(pipeline, self._accelerator.device),
                self._accelerator.autocast(),
            ):
                found = self._judge(pipeline, folder=folder)
            return {name: float(value) for name, value in found.items()}

        try:
            scores = together(judged)
        except NotExamined:
            clear_device_cache(garbage_collection=True)
            raise
        clear_device_cache()  # the judge's memory is not training's
        return broadcast_object_list([scores])[0]

    def _emptied(self, done: int) -> Path:
        self._discard(done)
        folder = self._folder / named(done)
        if self._accelerator.is_main_process:
            folder.mkdir(parents=True)
        return folder

    def _discard(self, done: int) -> None:
        if self._accelerator.is_main_process:
            shutil.rmtree(self._folder / named(done), ignore_errors=True)

    def _say(self, text: str) -> None:
        from tqdm import tqdm

        if self._accelerator.is_main_process:
            tqdm.write(text)


def together(work: Callable[[], T]) -> T:
    """What `work` gives in this process, once it has gone well in every one. A place where all of
    them meet.

    Where it fails in one, all of them raise alike: UserError if it did, else NotExamined.
    """
    from accelerate.utils import gather_object

    mistake = failure = None
    try:
        result = work()
    except UserError as error:
        mistake = str(error)
    except NotExamined as error:
        failure = str(error)
    except Exception as error:  # memory that did not suffice, above all, must not end a run
        failure = f"{type(error).__name__}: {error}"
    # Without its traceback, which would hold what lay in memory where it failed.
    said = gather_object([(mistake, failure)])
    for mistake, _ in said:
        if mistake is not None:
            raise UserError(mistake)
    for _, failure in said:
        if failure is not None:
            raise NotExamined(failure)
    return result


@contextmanager
def unchanged(pipeline: Pipeline, device: Any) -> Iterator[None]:
    """Leaves random state, the choice of kernels and the pipeline's scheduler as they were."""
    import numpy as np
    import torch

    cuda = [device] if device.type == "cuda" else []
    kernels = torch.backends.cudnn
    scheduler, drawn = pipeline.scheduler, (random.getstate(), np.random.get_state())
    flags = {name: getattr(kernels, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        pipeline.scheduler = scheduler
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        for name, value in flags.items():
            setattr(kernels, name, value)


def read(folder: Path, *, until: float = math.inf) -> list[Examined]:
    """All scores of a run up to a step that can be compared with the last of them, by step;
    unreadable files are left out."""
    found = [_read(content) for content in read_steps(folder)]
    intact = [one for one in found if one is not None and one.step <= until]
    return [one for one in intact if one.settings == intact[-1].settings]


def _read(content: dict[str, Any]) -> Examined | None:
    try:
        scores = {
            name: math.nan if value is None else float(value)
            for name, value in content["metrics"].items()
        }
        return Examined(int(content["step"]), scores, dict(content.get("settings", {})))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(
    score: str | None,
    better: Mapping[str, Better],
    config: EvaluationConfig,
) -> None:
    """Raises UserError for what cannot be had."""
    if score is not None and score not in better:
        given = ", ".join(better) or "none"
        raise UserError(
            f"validation.metric={score} is not among the scores that evaluation.every="
            f"{config.every} gives ({given}): choose one of them, or validation.metric=loss"
        )
