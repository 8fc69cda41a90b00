"""Which weights are used of those in training: the latest, their moving average, or the average
that schedule-free optimizers keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from train.sharding import fill


class Averages(Protocol):
    """What the training loop needs to know of them. The model's own weights are always the live
    ones, but within `applied` and after `settle`."""

    def update(self, step: int, taken: Tensor) -> None:
        """After optimizer step `step` (from 0). taken: () 1, or 0 where it was left out."""

    def applied(self) -> AbstractContextManager[None]:
        """Within it the model has the weights to be used; then exactly the live ones again."""

    def settle(self) -> None:
        """Puts the weights to be used into the model for good."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of them beside model and optimizer, by parameter name."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues as of a checkpoint, from what `state` gave, once the model and the optimizer
        are as they were then."""


def averages_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema_decay: float | None
) -> Averages:
    """The averages of what trains in `model`, which has its starting weights."""
    if callable(getattr(optimizer, "eval", None)):
        assert ema_decay is None, "a schedule-free optimizer averages already"
        return ScheduleFree(model, optimizer)
    return Latest() if ema_decay is None else MovingAverage(model, ema_decay)


class Latest:
    """No average: the live weights are used."""

    def update(self, step: int, taken: Tensor) -> None:
        pass

    @contextmanager
    def applied(self) -> Iterator[None]:
        yield

    def settle(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        pass


class MovingAverage:
    """Exponential moving average of the trainable parameters, in fp32 on their device."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._averages = {name: p.detach().float().clone() for name, p in _trainable(model).items()}

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """average += (1 - decay) (weights - average), but for a step that was left out.

        The first steps count more, decay = (1 + step) / (10 + step), so that the start is soon
        forgotten however slow the average is.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        weight = (1 - decay) * taken
        for name, parameter in _trainable(self._model).items():
            self._averages[name].lerp_(parameter.detach().float(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        with _restored(self._model):
            self.settle()
            yield

    def settle(self) -> None:
        _copy(self._averages, _trainable(self._model))

    def state(self) -> dict[str, Tensor]:
        return dict(self._averages)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """A checkpoint without averages starts them at its weights."""
        live = {name: p.detach() for name, p in _trainable(self._model).items()}
        _copy({name: state.get(name, value) for name, value in live.items()}, self._averages)


class ScheduleFree:
    """The average x that a schedule-free optimizer keeps in the shape of the live weights y and its
    iterates z: y = (1 - beta1) z + beta1 x (Defazio et al. 2024, equation 2)."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._switch(training=True)

    def _switch(self, *, training: bool) -> None:
        switch = getattr(self._optimizer, "train" if training else "eval")
        switch()

    def update(self, step: int, taken: Tensor) -> None:
        pass

    @contextmanager
    def applied(self) -> Iterator[None]:
        with _restored(self._model):
            self._switch(training=False)
            try:
                yield
            finally:
                self._switch(training=True)

    def settle(self) -> None:
        self._switch(training=False)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """All of it is the optimizer's."""


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """What trains has exactly its present values again afterwards."""
    parameters = _trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        _copy(before, parameters)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        fill(tensor, source[name])
