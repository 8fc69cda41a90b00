"""Randomness as a function of (seed, what it is for): no state to save, share or disturb.

Every draw names its purpose, e.g. ``normal(shape, seed, "noise", step, sample_id)``. A resumed run,
another number of processes or another number of workers therefore sees the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A Philox generator of its own for this (seed, purpose).

    The key is a 128-bit BLAKE2b hash of the JSON list [seed, *purpose], in which 1 and "1", or
    ("ab", "c") and ("a", "bc"), differ. Philox: Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011.
    """
    parts = [part if isinstance(part, str) else operator.index(part) for part in (seed, *purpose)]
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: Sequence[int], seed: int, *purpose: str | int) -> np.ndarray:
    """Standard normal numbers, float32, of the given shape."""
    return generator(seed, *purpose).standard_normal(tuple(shape), dtype=np.float32)


def uniform(seed: int, *purpose: str | int) -> float:
    """One number from [0, 1)."""
    return float(generator(seed, *purpose).random())


def integer(high: int, seed: int, *purpose: str | int) -> int:
    """One whole number from 0 to high - 1."""
    return int(generator(seed, *purpose).integers(high))
