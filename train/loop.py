"""fit(): the only training loop. It knows nothing of what it trains beyond the seam in
train/method.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train import optim, sharding
from train.averaging import Averages, averages_of
from train.checkpoint import Checkpoints, DamagedCheckpoint
from train.config import LoopConfig, RunFailed
from train.course import Course, P
from train.examination import Examination, Examined, Judge
from train.meter import Meter
from train.method import Method
from train.previews import Previews
from train.tracking import Trackers, open_trackers
from train.validation import HeldOut, Validation

MicroBatch = dict[str, Any]


class Batches(Protocol):
    """This process's micro-batches as a function of the optimizer step."""

    @property
    def held_out(self) -> HeldOut | None:
        """What the held-out loss is measured on, if anything."""

    def epochs(self, steps: int) -> float:
        """How many epochs so many optimizer steps are."""

    def __call__(self, start: int) -> Iterable[list[MicroBatch]]:
        """One list per optimizer step, from `start` to the last. The "weight" (B,) of a batch's
        samples sums to 1 over all processes, so that the weighted sum of losses is the mean over
        the global batch."""


def fit(
    method: Method,
    batches: Batches,
    config: LoopConfig,
    accelerator: Accelerator,
    judge: Judge | None = None,
) -> None:
    """Trains to `config.train.steps` optimizer steps, resuming from the run's newest checkpoint.

    judge: what scores pictures every `config.evaluation.every` steps, if anything.
    Whatever a step needs beyond weights and optimizer is a function of the step, so a resumed run
    repeats an uninterrupted one bit for bit.
    """
    raw, steps = method.model, config.train.steps
    optimizer = optim.build(method.parameter_groups(config.optim), config.optim)
    schedule = optim.Schedule(optimizer, steps=steps, config=config.optim)
    model, prepared = sharding.prepare(accelerator, raw, optimizer, config.train)
    averages = averages_of(raw, optimizer, config.train.ema_decay)
    checkpoints = Checkpoints(
        config.output / "checkpoints",
        keep=config.checkpoint.keep,
        writes=accelerator.is_main_process,
    )
    start = checkpoints.restore(raw, prepared, averages)
    require_same(start, accelerator)
    sharding.refresh(prepared)
    facts = checkpoints.facts(start) if start else {}
    if accelerator.scaler is not None and start:
        accelerator.scaler.load_state_dict(facts["scaler"])
    trainable = [p for p in raw.parameters() if p.requires_grad]
    trackers = open_trackers(
        config.output,
        config.model_dump(mode="json"),
        config.tracking,
        start=start,
        main=accelerator.is_main_process,
    )
    meter = Meter(
        accelerator,
        trackers,
        steps=steps,
        start=start,
        every=config.tracking.every,
        before=facts.get("meter"),
    )
    pause = Pause(
        method=method,
        model=model,
        optimizer=prepared,
        averages=averages,
        checkpoints=checkpoints,
        previews=Previews(config.output / "previews", config.preview, accelerator),
        validation=Validation(
            batches.held_out,
            config.validation,
            config.output / "validation",
            accelerator,
            start=start,
            kept=checkpoints.steps(),
        ),
        examination=Examination(
            judge,
            config.evaluation,
            config.output / "eval/steps",
            accelerator,
            score=config.validation.score,
            start=start,
            kept=checkpoints.steps(),
        ),
        trackers=trackers,
        meter=meter,
        config=config,
        accelerator=accelerator,
    )
    with meter.aside():
        pause.before(start)

    for step, micro_batches in enumerate(meter.waiting(batches(start)), start):
        rates = schedule.apply(step)
        seed_step(config.seed, step, accelerator.process_index)
        loss = accumulate(model, micro_batches, accelerator)
        norm = accelerator.clip_grad_norm_(trainable, config.train.clip_norm)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        averages.update(step)
        done = step + 1
        epoch = batches.epochs(done)
        meter.record(done, epoch, loss, rates, norm, images=images_in(micro_batches))
        with meter.aside():
            pause.after(done)
    meter.close()
    pause.settle()
    trackers.finish()


@dataclass(kw_only=True)
class Pause:
    """What is done between optimizer steps: checkpoints, previews, the held-out loss and the scores
    of pictures."""

    method: Method
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: Averages
    checkpoints: Checkpoints
    previews: Previews
    validation: Validation
    examination: Examination
    trackers: Trackers
    meter: Meter
    config: LoopConfig
    accelerator: Accelerator
    saved: int = 0
    """The step of the last checkpoint."""

    @property
    def chooser(self) -> Course[Any]:
        """Whose best is the best checkpoint."""
        return self.examination if self.config.validation.score else self.validation

    def before(self, start: int) -> None:
        """At the start of a run, or of its continuation from step `start`."""
        self.saved = start
        self._mark_best()
        if start == 0:
            with sharding.gathered(self.method, self.accelerator):
                self.previews.base(self.method)
        self._look(start)  # also where a run ended between a checkpoint and what follows it

    def after(self, done: int) -> None:
        """After `done` optimizer steps."""
        if self._due(done, self.config.checkpoint.every):
            self._save(done)
        self._look(done)

    def settle(self) -> None:
        """Leaves in the model the weights that are to be used."""
        wanted, title = self.config.validation.use_best, self.chooser.title
        best = self.chooser.best if wanted else None
        if best is not None:
            self._take(best.step)
        elif wanted:
            self.accelerator.print(f"no {title} was finite: the last weights are taken")
        self.averages.settle()
        sharding.gather(self.method, self.accelerator)
        if best is not None:
            self.previews.render(self.method, best.step)

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
            measured = self.validation.run(self.model, done) if measure else None
        self._keep(self.validation, measured)
        self._keep(self.examination, examined)

    def _draw(self, done: int, show: bool, examine: bool) -> Examined | None:
        """What takes pictures."""
        with sharding.gathered(self.method, self.accelerator):
            if show:
                self.previews.render(self.method, done)
            return self.examination.run(self.method, done) if examine else None

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
        self.checkpoints.save(
            done,
            self.method.model,
            self.optimizer,
            self.averages.state(),
            meter=self.meter.state(),
            **scaler_state(self.accelerator),
        )
        self.saved = done
        self.accelerator.wait_for_everyone()

    def _due(self, done: int, every: int) -> bool:
        return due(done, every, self.config.train.steps)


def due(done: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) and at the last is due after `done`."""
    return every > 0 and done > 0 and (done == steps or done % every == 0)


def require_same(start: int, accelerator: Accelerator) -> None:
    """Raises RunFailed where the processes do not go on from the same step. They meet here."""
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise RunFailed(
            f"the processes found checkpoints of different steps, {sorted(set(starts))}: give an "
            "output= that all machines share"
        )


def accumulate(
    model: nn.Module, micro_batches: list[MicroBatch], accelerator: Accelerator
) -> Tensor:
    """Backward through every micro-batch; gradients meet across processes once, at the last.
    Returns this process's part of the global batch's loss."""
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        batch = {
            k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()
        }
        if index < len(micro_batches) - 1:
            with sharding.no_sync(accelerator, model):
                total += _backward(model, batch, accelerator)
        else:
            total += _backward(model, batch, accelerator)
    return total


def _backward(model: nn.Module, batch: MicroBatch, accelerator: Accelerator) -> Tensor:
    loss = (model(batch) * batch["weight"]).sum()
    # Distributed wrappers average gradients over processes; ours are parts of one mean and must add
    # up.
    accelerator.backward(loss * accelerator.num_processes)
    return loss.detach()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds the global generators (dropout) from the step, so that nothing before it matters."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") % 2**63)


def images_in(micro_batches: list[MicroBatch]) -> int:
    """Images of this process, but for padding, which weighs nothing."""
    return sum(int((batch["weight"] > 0).sum()) for batch in micro_batches)


def scaler_state(accelerator: Accelerator) -> dict[str, Any]:
    return {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler is not None else {}
