"""Work that is done beside training, in a thread of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Thread

from train.config import RunFailed


class Background:
    """One piece of work at a time, whose failure is raised where it is waited for.

    A process that ends without waiting ends at once, and the work with it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun: _Work | None = None
        self._queue: SimpleQueue[_Work | None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins `work`, once what was begun before is done. Raises what that raised."""
        self.wait()
        if self._queue is None:
            # One thread for all: a new one holds up who starts it.
            self._queue = SimpleQueue()
            Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        self._begun = _Work(work)
        self._queue.put(self._begun)

    def wait(self, seconds: float | None = None) -> None:
        """Until all is done; raises what the work raised, and RunFailed if `seconds` do not
        suffice."""
        begun = self._begun
        if begun is None:
            return
        if not begun.done.wait(seconds):
            raise RunFailed(f"{self._name} is not done after {seconds} seconds")
        self._begun = None
        if begun.error is not None:
            raise begun.error


class _Work:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done = Event()
        self.error: BaseException | None = None

    def do(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def _serve(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        work.do()
        del work  # what it holds may be large
