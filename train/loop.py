"""fit(): the only training loop. It knows nothing of what it trains beyond the seam in
train/method.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train import optim, sharding
from train.averaging import Averages, averages_of
from train.checkpoint import Checkpoints
from train.config import LoopConfig, RunFailed
from train.examination import Judge
from train.meter import Meter
from train.method import Method
from train.pauses import Pause
from train.tracking import open_trackers
from train.validation import HeldOut

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
    trainable = [p for p in raw.parameters() if p.requires_grad]

    main, folder = accelerator.is_main_process, config.output / "checkpoints"
    checkpoints = Checkpoints(folder, keep=config.checkpoint.keep, writes=main)
    start, facts = restore(checkpoints, raw, prepared, averages, accelerator)

    settings = config.model_dump(mode="json")
    trackers = open_trackers(config.output, settings, config.tracking, start=start, main=main)
    meter = Meter(
        accelerator,
        trackers,
        steps=steps,
        start=start,
        every=config.tracking.every,
        before=facts.get("meter"),
    )
    pause = Pause(
        method,
        model,
        prepared,
        averages,
        checkpoints,
        trackers,
        meter,
        config,
        accelerator,
        held_out=batches.held_out,
        judge=judge,
        start=start,
    )
    with meter.aside():
        pause.before()

    for step, micro_batches in enumerate(meter.waiting(batches(start)), start):
        rates = schedule.apply(step)
        seed_step(config.seed, step, accelerator.process_index)
        loss = accumulate(model, micro_batches, accelerator)
        norm = accelerator.clip_grad_norm_(trainable, config.train.clip_norm)
        prepared.step()
        prepared.zero_grad(set_to_none=True)
        averages.update(step)
        done = step + 1
        images = images_in(micro_batches)
        meter.record(done, batches.epochs(done), loss, rates, norm, images=images)
        with meter.aside():
            pause.after(done)
    meter.close()
    pause.settle()
    trackers.finish()


def restore(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    accelerator: Accelerator,
) -> tuple[int, dict[str, Any]]:
    """The step to go on from, 0 for a new run, and what its checkpoint holds besides tensors."""
    start = checkpoints.restore(model, optimizer, averages)
    require_same(start, accelerator)
    sharding.refresh(optimizer)
    facts = checkpoints.facts(start) if start else {}
    if accelerator.scaler is not None and start:
        accelerator.scaler.load_state_dict(facts["scaler"])
    return start, facts


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
