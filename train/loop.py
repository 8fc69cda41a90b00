"""fit(): the only training loop. It knows nothing of what it trains beyond the seam in
train/method.py."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from train import optim
from train.averaging import averages_of
from train.checkpoint import Checkpoints
from train.config import LoopConfig, RunFailed
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
) -> None:
    """Trains to `config.train.steps` optimizer steps, resuming from the run's newest checkpoint.

    Whatever a step needs beyond weights and optimizer is a function of the step, so a resumed run
    repeats an uninterrupted one bit for bit.
    """
    output, steps = Path(config.output), config.train.steps
    raw = method.model
    optimizer = optim.build(method.parameter_groups(config.optim), config.optim)
    schedule = optim.Schedule(optimizer, steps=steps, config=config.optim)
    checkpoints = Checkpoints(output / "checkpoints", keep=config.checkpoint.keep)
    averages = averages_of(raw, optimizer, config.train.ema_decay)
    start = checkpoints.restore(raw, optimizer, averages)
    model, optimizer = accelerator.prepare(raw, optimizer)
    if accelerator.scaler is not None and start:
        accelerator.scaler.load_state_dict(checkpoints.facts(start)["scaler"])
    trainable = [p for p in raw.parameters() if p.requires_grad]
    trackers = open_trackers(
        output,
        config.model_dump(mode="json"),
        config.tracking,
        start=start,
        main=accelerator.is_main_process,
    )
    previews = Previews(output / "previews", config.preview, accelerator)
    validation = Validation(
        batches.held_out, config.validation, output / "validation", accelerator, start=start
    )

    def save(done: int) -> None:
        if accelerator.is_main_process and done not in checkpoints.steps():
            scaler = scaler_state(accelerator)
            checkpoints.save(done, raw, optimizer.optimizer, averages.state(), **scaler)
        accelerator.wait_for_everyone()

    def look(done: int) -> None:
        """Pictures and held-out loss of the weights that would be used after `done` steps."""
        with averages.applied():
            if due(done, config.preview.every, steps):
                previews.render(method, done)
            found = validation.run(model, done) if validation.due(done, steps) else None
        if found is not None:
            trackers.log({"step": done, **found.metrics})
        if found is not None and found.best and done > 0:
            save(done)
            if accelerator.is_main_process:
                checkpoints.mark_best(done, config.validation.metric, found.value)
            accelerator.wait_for_everyone()

    if start == 0:
        previews.base(method)
    look(start)  # also in case the run ended between checkpoint and preview
    meter = Meter(accelerator, trackers, steps=steps, start=start, every=config.tracking.every)

    for step, micro_batches in enumerate(meter.waiting(batches(start)), start):
        rates = schedule.apply(step)
        seed_step(config.seed, step, accelerator.process_index)
        loss = accumulate(model, micro_batches, accelerator)
        norm = accelerator.clip_grad_norm_(trainable, config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages.update(step)
        done = step + 1
        epoch = batches.epochs(done)
        meter.record(done, epoch, loss, rates, norm, images=images_in(micro_batches))
        with meter.aside():
            if due(done, config.checkpoint.every, steps):
                save(done)
            look(done)
    meter.close()
    if config.validation.use_best and (best := checkpoints.best()):
        checkpoints.load_weights(best["step"], raw, averages)
    averages.settle()
    trackers.finish()


def due(done: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) and at the last is due after `done`."""
    return every > 0 and done > 0 and (done == steps or done % every == 0)


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
            with accelerator.no_sync(model):
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


class Meter:
    """Progress bar and metrics: loss, speed and how much of the time went into waiting for data."""

    def __init__(
        self,
        accelerator: Accelerator,
        trackers: Trackers,
        *,
        steps: int,
        start: int,
        every: int,
    ) -> None:
        self._accelerator, self._trackers = accelerator, trackers
        self._steps, self._every = steps, every
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
        )
        self._reset()

    def _reset(self) -> None:
        self._since, self._waited = time.perf_counter(), 0.0
        self._count = self._images = 0
        self._loss = torch.zeros((), device=self._accelerator.device)

    def waiting(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Passes batches through and adds up the time spent waiting for them."""
        source = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent within is not counted as training."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def record(
        self,
        done: int,
        epoch: float,
        loss: Tensor,
        rates: dict[str, float],
        norm: Any,
        *,
        images: int,
    ) -> None:
        """Counts one optimizer step; every so often reads the device once and logs a line.

        Raises RunFailed, on every process alike, once the loss is not finite.
        """
        self._loss += loss
        self._count += 1
        self._images += images
        self._bar.update()
        if done % self._every and done != self._steps:
            return
        mine = torch.stack([self._loss, torch.full_like(self._loss, self._images)])
        total, seen = self._accelerator.reduce(mine, reduction="sum").tolist()
        seconds = time.perf_counter() - self._since
        loss_mean = total / self._count
        if not math.isfinite(loss_mean):
            raise RunFailed(
                f"the loss is not finite by step {done}. Repeat from the last checkpoint with "
                "train.mixed_precision=bf16 or no, or lower optim.learning_rate, in a new output="
            )
        metrics = {
            "step": done,
            "epoch": round(epoch, 4),
            "loss": loss_mean,
            **named_rates(rates),
            "grad_norm": float(norm) if math.isfinite(norm) else None,
            "images_per_second": round(seen / seconds, 3),
            "data_wait_fraction": round(self._waited / seconds, 4),
            "peak_memory_gib": round(peak_memory_gib(self._accelerator.device), 3),
        }
        self._trackers.log(metrics)
        self._bar.set_postfix(
            loss=f"{loss_mean:.4f}",
            img_s=f"{metrics['images_per_second']:.1f}",
            wait=f"{metrics['data_wait_fraction']:.0%}",
        )
        self._reset()

    def close(self) -> None:
        self._bar.close()


def named_rates(rates: dict[str, float]) -> dict[str, float]:
    """`lr` of the first part, and `lr_PART` of each other one whose differs."""
    first = next(iter(rates.values()))
    return {"lr": first} | {f"lr_{part}": rate for part, rate in rates.items() if rate != first}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device's allocator, or of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
