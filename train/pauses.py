"""What is done between optimizer steps: checkpoints, previews, the held-out loss and the scores of
pictures."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import nn

from train import sharding
from train.averaging import Averages
from train.checkpoint import Checkpoints, DamagedCheckpoint
from train.config import LoopConfig
from train.course import Course, P
from train.examination import Examination, Examined, Judge
from train.guards import Guard
from train.meter import Meter
from train.method import Method
from train.previews import Previews
from train.stopping import Agreement, Interrupted
from train.timings import Timings
from train.tracking import Trackers
from train.validation import HeldOut, Measured, Validation


class Pause:
    """From the step `start` on.

    model, optimizer: as prepared for distributed training; method: what they train. held_out,
    judge: what the held-out loss is measured on and what scores pictures, if anything does. To be
    made by all processes.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        averages: Averages,
        checkpoints: Checkpoints,
        trackers: Trackers,
        meter: Meter,
        guard: Guard,
        agreement: Agreement,
        config: LoopConfig,
        accelerator: Accelerator,
        *,
        held_out: HeldOut | None,
        judge: Judge | None,
        start: int,
    ) -> None:
        self.method, self.model, self.optimizer = method, model, optimizer
        self.averages, self.checkpoints = averages, checkpoints
        self.trackers, self.meter = trackers, meter
        self.guard, self.agreement = guard, agreement
        self.config, self.accelerator = config, accelerator
        self.start = self.saved = start
        """The step of the last checkpoint."""
        output, main = config.output, accelerator.is_main_process
        self.timings = Timings(output, start=start, main=main)
        where: dict[str, Any] = {"start": start, "kept": checkpoints.steps()}
        self.previews = Previews(output / "previews", config.preview, accelerator, start=start)
        self.validation = Validation(
            held_out, config.validation, output / "validation", accelerator, **where
        )
        self.examination = Examination(
            judge,
            config.evaluation,
            output / "eval/steps",
            accelerator,
            score=config.validation.score,
            use_best=config.validation.use_best,
            **where,
        )

    @property
    def chooser(self) -> Course[Any]:
        """Whose best is the best checkpoint."""
        return self.examination if self.config.validation.score else self.validation

    def before(self) -> None:
        """At the start of a run, or of its continuation. Raises as `after`."""
        self._mark_best()
        try:
            if self.start == 0:
                with self.timings.of("previews"), sharding.gathered(self.method, self.accelerator):
                    self.previews.base(self.method)
                self.agreement.check()
            # Also where a run ended between a checkpoint and what follows it.
            self._look(self.start)
            self.timings.write()
        except Interrupted as interrupted:
            self._end(self.start, interrupted)

    def is_due(self, done: int) -> bool:
        """Whether anything is to be done after `done` optimizer steps."""
        config, steps = self.config, self.config.train.steps
        looks = self.examination.due(done, steps) or self.validation.due(done, steps)
        often = (config.checkpoint.every, config.preview.every)
        return looks or any(self._due(done, every) for every in often)

    def after(self, done: int) -> None:
        """After `done` optimizer steps. Raises Interrupted, on every process alike and with a
        checkpoint saved, where one of them was asked to end."""
        if self.is_due(done):
            self.trackers.norms(done, self.method.model)
        if self._due(done, self.config.checkpoint.every):
            self._save(done)
        try:
            self.agreement.check()
            self._look(done)
        except Interrupted as interrupted:
            self._end(done, interrupted)
        if self.is_due(done):
            self.timings.write()

    def settle(self) -> None:
        """Leaves in the model the weights that are to be used, once all that was saved is on the
        disk."""
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()
        wanted, title = self.config.validation.use_best, self.chooser.title
        best = self.chooser.best if wanted else None
        if best is not None:
            self._take(best.step)
        elif wanted:
            self.accelerator.print(f"no {title} was finite: the last weights are taken")
        self.averages.settle()
        sharding.gather(self.method, self.accelerator)
        if best is not None:
            made = self.previews.render(self.method, best.step, check=lambda: None)
            if made:
                self.trackers.previews(best.step, self.previews)

    def _take(self, step: int) -> None:
        try:
            self.checkpoints.load(step, self.method.model, self.optimizer, self.averages)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(
                f"{error}. It is the best; validation.use_best=false ends with the last weights"
            ) from None
        self.accelerator.print(
            f"took the weights of step {step} ({self.chooser.title} {self.chooser.value:.4f})"
        )

    def _end(self, done: int, interrupted: Interrupted) -> NoReturn:
        """The end of a run that was asked to, after `done` steps."""
        if done:
            self._save(done)
            self.checkpoints.wait()
        # A launcher that sees one process end ends the others: not before all is saved. On the
        # host, where it is noticed if the first process failed to.
        self.agreement.wait()
        interrupted.step = done
        raise interrupted

    def _look(self, done: int) -> None:
        """At the weights that would be used after `done` steps."""
        steps = self.config.train.steps
        show = self._due(done, self.config.preview.every)
        examine = self.examination.due(done, steps)
        measure = self.validation.due(done, steps)
        if not (show or examine or measure):
            return
        with self.averages.applied():
            examined = self._draw(done, show, examine) if show or examine else None
            measured = self._measure(done) if measure else None
        self._keep(self.validation, measured)
        self._keep(self.examination, examined)

    def _draw(self, done: int, show: bool, examine: bool) -> Examined | None:
        """What takes pictures."""
        with sharding.gathered(self.method, self.accelerator):
            if show:
                with self.timings.of("previews"):
                    made = self.previews.render(self.method, done)
                if made:
                    self.trackers.previews(done, self.previews)
                self.agreement.check()
            with self.timings.of("evaluation"):
                return self.examination.run(self.method, done) if examine else None

    def _measure(self, done: int) -> Measured:
        with self.timings.of("validation"):
            return self.validation.run(self.model, done, self.agreement.check)

    def _keep(self, course: Course[P], found: P | None) -> None:
        """What was found, and the checkpoint if it is the best.

        The course's own file comes last: a run killed before it measures once more.
        """
        if found is None:
            return
        self.trackers.log({"step": found.step, **found.metrics()})
        is_best: bool = self.chooser.best is found
        if is_best:
            self._save(found.step)
            self._mark_best()
        course.write(found)

    def _mark_best(self) -> None:
        best = self.chooser.best
        if best is None:
            self.checkpoints.mark_best(None)
        else:
            metric = self.config.validation.metric
            self.checkpoints.mark_best(best.step, metric=metric, value=self.chooser.value)

    def _save(self, done: int) -> None:
        if done == self.saved:
            return
        with self.timings.of("checkpoints"):
            self.checkpoints.save(
                done,
                self.method.model,
                self.optimizer,
                self.averages.state(),
                meter=self.meter.state(),
                guard=self.guard.state(),
                **scaler_state(self.accelerator),
            )
        self.saved = done

    def _due(self, done: int, every: int) -> bool:
        return due(done, every, self.config.train.steps)


def due(done: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) and at the last is due after `done`."""
    return every > 0 and done > 0 and (done == steps or done % every == 0)


def scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    return {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler is not None else {}
