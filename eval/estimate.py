"""A number and how sure it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.96
"""Standard errors on either side of a 95 % interval."""


class Estimate(NamedTuple):
    """A value with its standard error."""

    value: float
    standard_error: float

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval; not cut at 0, where unbiased distances go too."""
        return self.value - NORMAL_95 * self.standard_error

    @property
    def high(self) -> float:
        return self.value + NORMAL_95 * self.standard_error

    @classmethod
    def around(cls, value: float, resampled: np.ndarray) -> Estimate:
        """The value itself with the spread of its bootstrap (resamples,), whose mean is ignored."""
        return cls(value, float(np.std(resampled, ddof=1)))
