"""Numbers as a person would write them."""

from __future__ import annotations


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
