"""Which timestep and which noise each sample of each step has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from data import counter
from train.config import DiffusionConfig, UserError

Purpose = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Noising:
    """Timesteps and noise as a function of (seed, step, what they are for)."""

    first: int
    """Lowest timestep."""
    count: int
    """How many from there on."""
    sampler: Literal["uniform", "stratified", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_scale: float = 1.0
    offset: float = 0.0
    """Standard deviation of what is added to each channel of the noise as a whole."""
    perturbation: float = 0.0
    """Standard deviation of the noise that only the input has."""

    @classmethod
    def of(cls, config: DiffusionConfig, num_train_timesteps: int) -> Self:
        """Raises UserError where a limit lies beyond the schedule."""
        last = num_train_timesteps - 1
        highest = last if config.max_timestep is None else config.max_timestep
        for key, limit in (("min_timestep", config.min_timestep), ("max_timestep", highest)):
            if limit > last:
                raise UserError(
                    f"diffusion.{key}={limit}: the base's schedule has the timesteps 0 to {last}; "
                    "choose one of them"
                )
        return cls(
            first=config.min_timestep,
            count=highest - config.min_timestep + 1,
            sampler=config.timesteps,
            logit_mean=config.logit_mean,
            logit_scale=config.logit_scale,
            offset=config.noise_offset,
            perturbation=config.input_perturbation,
        )

    def timestep(self, seed: int, step: int, purpose: Purpose, *, position: int, total: int) -> int:
        """The timestep of the sample at `position` (from 0) of the `total` of its step's global
        batch, over all processes."""
        if self.sampler == "uniform":
            return self.first + counter.integer(self.count, seed, "timestep", *purpose)
        if self.sampler == "stratified":
            share = self._stratified(seed, step, purpose, position, total)
        else:
            share = self._logit_normal(seed, purpose)
        return self.first + min(int(share * self.count), self.count - 1)

    def _stratified(
        self, seed: int, step: int, purpose: Purpose, position: int, total: int
    ) -> float:
        """Somewhere in one of `total` equal parts of [0, 1), each of them one position's."""
        assert 0 <= position < total
        # Dealt out anew at every step, or a position in the batch would always have the same part.
        part = counter.generator(seed, "strata", step).permutation(total)[position]
        return (int(part) + counter.uniform(seed, "timestep", *purpose)) / total

    def _logit_normal(self, seed: int, purpose: Purpose) -> float:
        """sigmoid of a normal number, where 1 is noise (Esser et al. 2024, eq. 19)."""
        normal = float(counter.normal((), seed, "timestep", *purpose))
        return (1 + math.tanh((self.logit_mean + self.logit_scale * normal) / 2)) / 2

    def noise(self, shape: Sequence[int], seed: int, purpose: Purpose) -> dict[str, np.ndarray]:
        """The "noise" of `shape` (C, h, w), float32, and "input_noise" where the input's differs.

        With an offset, each channel's noise is shifted by one normal number of its own (Guttenberg
        2023). Input perturbation trains the network on input like its own imperfect steps, towards
        an unperturbed target (Ning et al. 2023, algorithm 1).
        """
        noise = counter.normal(shape, seed, "noise", *purpose)
        if self.offset:
            channels = counter.normal((shape[0], 1, 1), seed, "noise_offset", *purpose)
            noise = noise + np.float32(self.offset) * channels
        if not self.perturbation:
            return {"noise": noise}
        extra = counter.normal(shape, seed, "input_perturbation", *purpose)
        return {"noise": noise, "input_noise": noise + np.float32(self.perturbation) * extra}
