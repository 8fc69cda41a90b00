"""Taking the next item of an iterator while the last one is worked on."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Full, Queue
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Item: TypeAlias = tuple[T | None, BaseException | None]
Given: TypeAlias = "Queue[Item[T]]"

_LOOK_SECONDS = 0.1  # between two looks at whether anyone still wants more
_LEAVE_SECONDS = 10.0  # how long one that is closed waits for what is being taken


class _End(Exception):
    """No more."""


def ahead(source: Iterator[T]) -> Generator[T]:
    """The same items, the next one of which a thread takes meanwhile.

    Raises what `source` raises, in its place. Closed early, it takes no more, and lets go of
    `source`.
    """
    ready: Given[T] = Queue(1)
    closed = threading.Event()
    thread = threading.Thread(target=_take, args=(source, ready, closed), daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, _End):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # which is None only beside an error
    finally:
        closed.set()
        thread.join(_LEAVE_SECONDS)


def _take(source: Iterator[T], ready: Given[T], closed: threading.Event) -> None:
    try:
        for item in source:
            if not _put(ready, (item, None), closed):
                return
        _put(ready, (None, _End()), closed)
    except BaseException as error:
        del source  # which the error's traceback would keep
        _put(ready, (None, error), closed)


def _put(ready: Given[T], what: Item[T], closed: threading.Event) -> bool:
    """Whether anyone wanted it."""
    while not closed.is_set():
        try:
            ready.put(what, timeout=_LOOK_SECONDS)
            return True
        except Full:
            pass
    return False
