"""Numbers as a person would write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: float) -> str:
    """A value with about three digits."""
    if not value:
        return "0"
    steps = ((1000, 0), (100, 1), (1, 2), (0.1, 3))
    digits = next((digits for least, digits in steps if abs(value) >= least), 4)
    return f"{value:.{digits}f}"


def signed(value: float, digits: str | None = None) -> str:
    """The same with its sign, a true minus; `digits` is a format such as ".1f"."""
    size = f"{abs(value):{digits}}" if digits else number(abs(value))
    return ("+" if value > 0 else "\u2212" if value < 0 else "") + size


def settled(content: Any) -> Any:
    """The same with every float at 9 significant digits and 10 decimals: more than that hangs on
    how many threads added them up, and files must not."""
    if isinstance(content, float):
        return float(f"{round(content, 10):.9g}") if math.isfinite(content) else content
    if isinstance(content, Mapping):
        return {name: settled(each) for name, each in content.items()}
    if isinstance(content, list | tuple):
        return [settled(each) for each in content]
    return content
