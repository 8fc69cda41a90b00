"""Batches that note how long the training loop takes with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

_REFILL_SECONDS = 0.02  # that the loader's processes have for the next batch
WARM = 3  # steps that do not count; nor does the last, which saves a checkpoint


class Watched:
    """Batches that are noted how long `fit` takes with them."""

    held_out = None

    def __init__(self, batches: Any) -> None:
        self._batches, self.steps = batches, batches.steps

    def epochs(self, steps: int) -> float:
        return self._batches.epochs(steps)

    def work(self, micro_batches: Any) -> float:
        return self._batches.work(micro_batches)


class Timed(Watched):
    """All of some steps, from the first that counts. The device is waited for at both ends, and not
    between."""

    def __init__(self, batches: Any, wait: Callable[[], None], counted: int) -> None:
        super().__init__(batches)
        self._wait, self._counted = wait, counted
        self.seconds = self.waited = 0.0

    def __call__(self, start: int) -> Iterator[Any]:
        source = iter(self._batches(start))
        began = waited = 0.0
        for number in range(self.steps):
            if number == WARM:
                self._wait()
                began, waited = time.perf_counter(), 0.0
            if number == WARM + self._counted:
                self._wait()
                self.seconds, self.waited = time.perf_counter() - began, waited
            before = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - before
            yield batch


class Turns(Watched):
    """Each step by itself, and something else between any two."""

    def __init__(
        self, batches: Any, now: Callable[[], float], between: Callable[[], dict[str, float]]
    ) -> None:
        super().__init__(batches)
        self._now, self._between = now, between
        self.taken: list[dict[str, float]] = []

    def __call__(self, start: int) -> Iterator[Any]:
        source = iter(self._batches(start))
        for _ in range(self.steps):
            began = self._now()
            yield next(source)
            loop = self._now() - began
            time.sleep(_REFILL_SECONDS)  # what is made ahead for the loop is not the other's to pay
            self.taken.append({"loop": loop} | self._between())
