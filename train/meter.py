"""Progress bar and metrics of a run: loss, rates, speed, memory and time spent waiting for data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from train import screens
from train.resident import peak_resident
from train.tracking import Trackers


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
        left_out: Callable[[], int] = lambda: 0,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        """left_out: how many steps were so far. before: what `state` gave at step `start`."""
        self._accelerator, self._trackers, self._left_out = accelerator, trackers, left_out
        self._steps, self._every = steps, every
        self._bar = screens.bar(
            steps,
            "training",
            unit="steps",
            initial=start,
            shown=accelerator.is_main_process,
            leave=True,
            delay=0.0,
        )
        self._paused: float | None = None
        self._reset()
        if before is not None:
            self._go_on(before)

    def _reset(self) -> None:
        self._since, self._waited = time.perf_counter(), 0.0
        self._images, self._work = 0, 0.0
        self._loss = torch.zeros((), device=self._accelerator.device)
        self._taken = torch.zeros((), device=self._accelerator.device)

    def state(self) -> dict[str, Any]:
        """Of the line that is not full yet, the losses by process. The processes meet here."""
        losses, images, taken = self._accelerator.gather(self._mine()[None]).T.tolist()
        return {
            "losses": losses,
            "images": sum(images),
            "steps": int(taken[0]),
            "seconds": self._seconds(),
            "waited": self._waited,
            "work": self._work,
        }

    def _go_on(self, before: Mapping[str, Any]) -> None:
        self._taken += before["steps"]
        self._since -= before["seconds"]
        self._waited, self._work = before["waited"], before.get("work", 0.0)
        losses, main = before["losses"], self._accelerator.is_main_process
        if len(losses) == self._accelerator.num_processes:
            # Each goes on from its own: floats that are added up in another order differ.
            self._loss += losses[self._accelerator.process_index]
        elif main:
            self._loss += sum(losses)
        self._images = int(before["images"]) if main else 0

    def _summed(self) -> tuple[float, float, float]:
        """Losses and images of all processes, and the steps they took together."""
        sums = self._accelerator.reduce(self._mine(), reduction="sum").tolist()
        loss, images, taken = sums
        return loss, images, taken / self._accelerator.num_processes

    def _mine(self) -> Tensor:
        """(3,) losses, images and steps taken of this process."""
        images = torch.full_like(self._loss, self._images)
        return torch.stack([self._loss, images, self._taken])

    def _seconds(self) -> float:
        """Of training."""
        now = time.perf_counter() if self._paused is None else self._paused
        return now - self._since

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
    def aside(self, *, waits: bool = False) -> Iterator[None]:
        """Time spent within is not counted as training. waits: for the device, whose work up to
        here is training still."""
        if waits and self._accelerator.device.type == "cuda":
            torch.cuda.synchronize(self._accelerator.device)
        self._paused = time.perf_counter()
        yield
        seconds = time.perf_counter() - self._paused
        self._since += seconds
        screens.leave_out(self._bar, seconds)
        self._paused = None

    def record(
        self,
        done: int,
        epoch: float,
        loss: Tensor,
        taken: Tensor,
        rates: dict[str, float],
        norm: Any,
        *,
        images: int,
        work: float = 0.0,
    ) -> None:
        """Counts one optimizer step; every so often reads the device once and logs a line.

        taken: () 0 for a step that was left out, whose loss does not count, else 1. work: seconds
        that the step would take this device at its peak rate; 0 where that is unknown.
        """
        self._loss += torch.where(taken > 0, loss, 0)
        self._taken += taken
        self._images += images
        self._work += work
        self._bar.update()
        if done % self._every == 0 or done == self._steps:
            self._log(done, epoch, rates, norm)

    def _log(self, done: int, epoch: float, rates: dict[str, float], norm: Any) -> None:
        """A line of metrics, the only place where the device is waited for."""
        (total, seen, count), seconds = self._summed(), self._seconds()
        loss_mean, left_out = total / count if count else None, self._left_out()
        metrics = {
            "step": done,
            "epoch": round(epoch, 4),
            "loss": loss_mean,
            **named_rates(rates),
            "grad_norm": float(norm) if math.isfinite(norm) else None,
            **({"left_out": left_out} if left_out else {}),
            "images_per_second": round(seen / seconds, 3),
            "data_wait_fraction": round(self._waited / seconds, 4),
            **({"mfu": round(self._work / seconds, 4)} if self._work else {}),
            "peak_memory_gib": round(peak_memory_gib(self._accelerator.device), 3),
        }
        self._trackers.log(metrics)
        screens.event("step", steps=self._steps, **metrics)
        self._bar.set_postfix(
            loss="-" if loss_mean is None else f"{loss_mean:.4f}",
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
    return peak_resident() / 2**30
