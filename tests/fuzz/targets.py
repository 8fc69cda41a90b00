"""What is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

from tests.fuzz import configs, headers, listings, plans


@dataclass(frozen=True)
class Target:
    examples: Callable[[], SearchStrategy[Any]]
    check: Callable[[Any, Path], None]


TARGETS = {
    "config": Target(configs.examples, configs.check),
    "plan": Target(plans.examples, plans.check),
    "metadata": Target(listings.examples, listings.check),
    "safetensors": Target(headers.examples, headers.check),
}
