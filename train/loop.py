"""fit(): the only training loop. It knows nothing of what it trains beyond the seam in
train/method.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from train import compiling, optim, sharding
from train.averaging import Averages, averages_of
from train.checkpoint import Checkpoints, DamagedCheckpoint
from train.config import LoopConfig, RunFailed
from train.examination import Judge
from train.guards import Seen, guard_of, memory_named
from train.meter import Meter
from train.method import Method
from train.pauses import Pause
from train.stopping import Agreement
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

    def work(self, micro_batches: list[MicroBatch]) -> float:
        """The seconds that they would take the device at its peak rate; 0 where that is unknown."""

    def __call__(self, start: int) -> Iterable[list[MicroBatch]]:
        """One list per optimizer step, from `start` to the last. The "weight" (B,) of a batch's
        samples sums to 1 over all processes, so that the weighted sum of losses is the mean over
        the global batch. Its "ids", a list of B, name them where one is bad."""


def fit(
    method: Method,
    batches: Batches,
    config: LoopConfig,
    accelerator: Accelerator,
    judge: Judge | None = None,
    publish: Callable[[], None] = lambda: None,
) -> None:
    """Trains to `config.train.steps` optimizer steps, resuming from the run's newest checkpoint.

    judge: what scores pictures every `config.evaluation.every` steps, if anything. publish: makes
    of the trained weights what the user takes away, while dashboards can still be given it.
    Whatever a step needs beyond weights and optimizer is a function of the step, so a resumed run
    repeats an uninterrupted one bit for bit. Raises Interrupted, with a checkpoint saved, where one
    of its processes was asked to end.
    """
    raw, steps = method.model, config.train.steps
    optimizer = optim.build(method.parameter_groups(config.optim), config.optim)
    schedule = optim.Schedule(optimizer, steps=steps, config=config.optim)
    compiling.compile_regions(raw, config.train.compile)
    model, prepared = sharding.prepare(accelerator, raw, optimizer, config.train)
    averages = averages_of(raw, optimizer, config.train.ema_decay)
    trainable = [p for p in raw.parameters() if p.requires_grad]

    main, folder = accelerator.is_main_process, config.output / "checkpoints"
    checkpoints = Checkpoints(
        folder,
        keep=config.checkpoint.keep,
        writes=main,
        asynchronous=config.checkpoint.asynchronous,
    )
    start, facts = restore(checkpoints, raw, prepared, averages, accelerator)

    settings = config.model_dump(mode="json")
    trackers = open_trackers(config.output, settings, config.tracking, start=start, main=main)
    agreement = Agreement(accelerator)
    guard = guard_of(
        accelerator,
        agreement,
        optimizer,
        allowed=config.train.skip_non_finite,
        before=facts.get("guard"),
    )
    meter = Meter(
        accelerator,
        trackers,
        steps=steps,
        start=start,
        every=config.tracking.every,
        left_out=guard.settled,
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
        guard,
        agreement,
        config,
        accelerator,
        held_out=batches.held_out,
        judge=judge,
        start=start,
    )
    with ExitStack() as ending:
        ending.enter_context(trackers)
        ending.callback(meter.close)
        ending.callback(checkpoints.close)
        ending.enter_context(memory_named(checkpoints, config, accelerator))
        with meter.aside():
            pause.before()

        for step, micro_batches in enumerate(meter.waiting(batches(start)), start):
            done = step + 1
            rates = schedule.apply(step)
            seed_step(config.seed, step, accelerator)
            seen = accumulate(model, micro_batches, accelerator)
            norm = accelerator.clip_grad_norm_(trainable, config.train.clip_norm)
            taken = guard.step(done, seen, norm, prepared)
            averages.update(step, taken)
            prepared.zero_grad(set_to_none=True)
            meter.record(
                done,
                batches.epochs(done),
                seen.loss,
                taken,
                rates,
                norm,
                images=images_in(micro_batches),
                work=batches.work(micro_batches),
            )
            with meter.aside(waits=pause.is_due(done)):
                pause.after(done)
        meter.close()
        pause.settle()
        publish()
        trackers.deliver(config.output, settings)


def restore(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Averages,
    accelerator: Accelerator,
) -> tuple[int, dict[str, Any]]:
    """The step to go on from, 0 for a new run, and what its checkpoint holds besides tensors.

    One process finds it, for all. Raises DamagedCheckpoint where there are checkpoints and none is
    intact, and RunFailed where a process does not see the one that was found.
    """
    start = found_by_the_first(checkpoints, accelerator)
    if not start:
        return 0, {}
    if not checkpoints.path(start).is_dir():
        raise RunFailed(
            f"process {accelerator.process_index} does not see {checkpoints.path(start)}: give an "
            "output= that all machines share"
        )
    checkpoints.load(start, model, optimizer, averages, verified=True)
    sharding.refresh(optimizer)
    facts = checkpoints.facts(start)
    if accelerator.scaler is not None and "scaler" in facts:
        accelerator.scaler.load_state_dict(facts["scaler"])
    return start, facts


def found_by_the_first(checkpoints: Checkpoints, accelerator: Accelerator) -> int:
    """The newest intact step. All processes meet here, and raise alike where there is none."""
    found: tuple[int, DamagedCheckpoint | None] = (0, None)
    if accelerator.is_main_process:
        try:
            found = checkpoints.find(), None
        except DamagedCheckpoint as error:
            found = 0, error
    step, damage = broadcast_object_list([found])[0]
    if damage is not None:
        raise damage
    return step


def accumulate(model: nn.Module, micro_batches: list[MicroBatch], accelerator: Accelerator) -> Seen:
    """Backward through every micro-batch; gradients meet across processes once, at the last."""
    total = torch.zeros((), device=accelerator.device)
    seen: list[tuple[list[str], Tensor]] = []
    for index, batch in enumerate(micro_batches):
        batch = {
            k: v.to(accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v
            for k, v in batch.items()
        }
        last = index == len(micro_batches) - 1
        with nullcontext() if last else sharding.no_sync(accelerator, model):
            losses = _backward(model, batch, accelerator)
        total += (losses * batch["weight"]).sum()
        seen.append((list(batch.get("ids", range(len(losses)))), losses))
    return Seen(total, seen)


def _backward(model: nn.Module, batch: MicroBatch, accelerator: Accelerator) -> Tensor:
    """The losses (B,)."""
    losses = model(batch)
    loss = (losses * batch["weight"]).sum()
    # Distributed wrappers average gradients over processes; ours are parts of one mean and must add
    # up.
    accelerator.backward(loss * accelerator.num_processes)
    return losses.detach()


def seed_step(seed: int, step: int, accelerator: Accelerator) -> None:
    """Seeds the global generators (dropout) from the step, so that nothing before it matters."""
    text, device = f"{seed}/{step}/{accelerator.process_index}", accelerator.device
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") % 2**63
    # Not torch.manual_seed: of devices that are not in use it keeps every call, for ever.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def images_in(micro_batches: list[MicroBatch]) -> int:
    """Images of this process, but for padding, which weighs nothing."""
    return sum(int((batch["weight"] > 0).sum()) for batch in micro_batches)
