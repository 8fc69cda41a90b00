"""Runs that are killed at a function's first call, at its second and so on, and started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Kill(BaseException):
    pass


def killed_and_resumed(
    monkeypatch: Any,
    owner: Any,
    name: str,
    run: Callable[[Path], Any],
    folder: Path,
    *,
    after: bool,
) -> Iterator[tuple[Path, Any]]:
    """Output and result of each run that was killed before (or after) the k-th call of owner.name
    and then started again, for k = 1, 2, ... as far as there are calls."""
    whole, at = getattr(owner, name), 0
    while True:
        at, calls = at + 1, []

        def killed(*arguments: Any, calls: list = calls, at: int = at, **keywords: Any) -> Any:
            calls.append(name)
            if len(calls) == at and not after:
                raise Kill
            given = whole(*arguments, **keywords)
            if len(calls) == at:
                raise Kill
            return given

        output = folder / str(at)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, killed)
                run(output)
        except Kill:
            yield output, run(output)
        else:
            return
