"""Scores of pictures made in the course of training, always of the same prompts and seeds, so that
what changes between two of them is the model.

Who makes and scores them is not known here (eval/in_training.py). Light until it runs: a report
uses the rest.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from train.config import EvaluationConfig, RunFailed, UserError
from train.course import Better, Course, named, read_steps, write_step
from train.stopping import Interrupted, tell_others

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.method import Method, Pipeline

T = TypeVar("T")

# What may change without changing the scores.
_BESIDES = {"every", "images", "per_prompt", "batch_size", "training_images", "general", "scales"}
_COUNTS = ("pictures", "reference", "dimension")


class Judge(Protocol):
    """Makes pictures and scores them."""

    @property
    def better(self) -> Mapping[str, Better]:
        """Every metric it gives, and which way is better."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many `pictures` it makes, of how many real ones its `reference` is, and the
        `dimension` of its features; what it cannot say is left out."""

    def __call__(self, pipeline: Pipeline, *, folder: Path) -> Mapping[str, float]:
        """Pictures by `pipeline` into `folder`, which is there and empty, and their metrics.

        Called by all processes together, under the run's autocast, without gradients; process 0's
        numbers count. Random state, cuDNN's settings and the pipeline's scheduler may be changed,
        weights not. Raises what it likes, but in all processes: what can fail in one of them alone
        is to be done in `together`. Once the run has begun to train it costs the step its scores,
        not the run.
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
    counts: Mapping[str, int] = field(default_factory=dict)
    """As the judge gave them."""

    def value(self, metric: str) -> float:
        """nan for one that it has not."""
        return self.scores.get(metric, math.nan)

    def metrics(self) -> dict[str, float | None]:
        """As metrics.jsonl has them; None for what is not finite."""
        return {f"evaluation/{name}": value for name, value in self._finite().items()}

    def write(self, folder: Path) -> None:
        """FOLDER/step-00000100.json, whole or not at all."""
        content = {"metrics": self._finite(), **self.counts, "settings": {**self.settings}}
        write_step(folder, self.step, content)

    def _finite(self) -> dict[str, float | None]:
        return {name: v if math.isfinite(v) else None for name, v in self.scores.items()}


class Examination(Course[Examined]):
    """Has a judge make pictures and score them: OUTPUT/step-00000100/ and step-00000100.json.

    judge: None for a run without. score: the metric that chooses the best checkpoint, if one of
    these does; use_best: whether the run ends with that. The rest is as for Course.

    Raises UserError for a score that the judge does not give, and for settings by which the run
    would lose the best that it is to end with.
    """

    def __init__(
        self,
        judge: Judge | None,
        config: EvaluationConfig,
        output: Path,
        accelerator: Accelerator,
        *,
        score: str | None = None,
        use_best: bool = False,
        start: int,
        kept: Collection[int] = (),
    ) -> None:
        better = judge.better if judge is not None else {}
        _check(score, better, config)
        self._judge, self._start = judge, start
        self._accelerator = accelerator
        self._settings = config.model_dump(mode="json", exclude=_BESIDES)
        known = read(output, until=start) if start and judge is not None else []
        if known and (changes := changed(known[-1].settings, self._settings)):
            with_checkpoint = [one for one in known if one.step in kept]
            best = _best(with_checkpoint, score, better)
            if best is not None and use_best:
                raise UserError(f"{_dropped(best, score, changes)} {_GO_ON}")
            self._say(f"warning: {_dropped(best, score, changes)}")
            known = []
        super().__init__(
            known,
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
        except (NotExamined, UserError) as error:
            self._discard(done)
            self._refuse(done, error)
            return None
        assert self._judge is not None
        examined = Examined(done, scores, self._settings, self._judge.counts)
        self._add(examined)
        self._say(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        return examined

    def _scores(self, method: Method, pipeline: Pipeline, folder: Path) -> dict[str, float]:
        """Those of process 0, in every process."""
        import torch
        from accelerate.utils import broadcast_object_list
        from accelerate.utils.memory import clear_device_cache

        from train import resting
        from train.previews import at_rest

        device = self._accelerator.device

        def judged() -> dict[str, float]:
            assert self._judge is not None
            with (
                torch.no_grad(),
                resting.awake(pipeline, device),
                at_rest(method.model),
                unchanged(pipeline, device),
                self._accelerator.autocast(),
            ):
                found = self._judge(pipeline, folder=folder)
            return {name: float(value) for name, value in found.items()}

        try:
            scores = together(judged)
        except (NotExamined, UserError):
            clear_device_cache(garbage_collection=True)
            raise
        clear_device_cache()  # the judge's memory is not training's
        return broadcast_object_list([scores])[0]

    def _refuse(self, done: int, error: Exception) -> None:
        """Writes down that the step has no scores; raises where nothing is lost yet by that."""
        if done == 0 and isinstance(error, NotExamined):
            raise RunFailed(
                f"the base's pictures could not be made and scored ({error}), and no others would "
                "be: where memory does not suffice, lower evaluation.batch_size; "
                "evaluation.every=0 trains without"
            ) from None
        if done == self._start and isinstance(error, UserError):
            raise error
        self._say(f"warning: step {done} has no scores: {error}")
        if self._accelerator.is_main_process:
            write_step(self._folder, done, {"failed": str(error), "settings": self._settings})

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

    Where it fails in one, all of them raise alike: Interrupted if it did, UserError if it did, else
    NotExamined.
    """
    from accelerate.utils import gather_object

    mistake = failure = None
    asked = 0
    try:
        result = work()
    except Interrupted as interrupted:
        asked = interrupted.number
        tell_others(asked)
    except UserError as error:
        mistake = str(error)
    except NotExamined as error:
        failure = str(error)
    except Exception as error:  # memory that did not suffice, above all, must not end a run
        failure = f"{type(error).__name__}: {error}"
    # Without its traceback, which would hold what lay in memory where it failed.
    said = gather_object([(asked, mistake, failure)])
    if asked := max(number for number, _, _ in said):
        raise Interrupted(asked)
    for _, mistake, _ in said:
        if mistake is not None:
            raise UserError(mistake)
    for _, _, failure in said:
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
    return [one for one in intact if not changed(one.settings, intact[-1].settings)]


def failures(folder: Path) -> dict[int, str]:
    """Why the steps that have no scores have none."""
    found = [content for content in read_steps(folder) if "failed" in content]
    return {int(content["step"]): str(content["failed"]) for content in found}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings for which scores cannot be compared, with both values. What only one has came or
    went with a version of this program."""
    both = sorted(before.keys() & now.keys() - _BESIDES)
    return [
        f"evaluation.{name} was {before[name]} and is {now[name]}"
        for name in both
        if before[name] != now[name]
    ]


_GO_ON = (
    "As validation.use_best=true is to end with it, restore the setting; or go on without it, with "
    "validation.use_best=false"
)


def _dropped(best: Examined | None, score: str | None, changes: Sequence[str]) -> str:
    """That what was scored before does not count."""
    said = f"{', '.join(changes)}: what was scored before cannot be compared with what will be"
    if best is None:
        return f"{said}, and is left out."
    value = f"{score} {best.value(str(score)):.4g}"
    return f"{said}, so step {best.step}, the best so far ({value}), does not count any more."


def _best(
    found: Sequence[Examined], score: str | None, better: Mapping[str, Better]
) -> Examined | None:
    """The best after training began, if a score chooses it."""
    finite = [one for one in found if score and one.step and math.isfinite(one.value(score))]
    sign = -1 if better.get(score or "") == "more" else 1
    return min(finite, key=lambda one: sign * one.value(str(score)), default=None)


def _read(content: dict[str, Any]) -> Examined | None:
    try:
        scores = {
            name: math.nan if value is None else float(value)
            for name, value in content["metrics"].items()
        }
        counts = {name: int(content[name]) for name in _COUNTS if name in content}
        return Examined(int(content["step"]), scores, dict(content.get("settings", {})), counts)
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
