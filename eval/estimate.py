"""A number and how sure it is."""

from __future__ import annotations

import math
from typing import NamedTuple

from eval.significance import student


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    standard_error: float
    """NaN where it cannot be known."""
    freedom: float = math.inf
    """Degrees of freedom of the error: of how many prompts it is, less one."""

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.standard_error)

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval; not cut at 0, where unbiased distances go too."""
        return self.value - self._half

    @property
    def high(self) -> float:
        return self.value + self._half

    @property
    def _half(self) -> float:
        return student(0.975, self.freedom) * self.standard_error if self.known else math.nan
