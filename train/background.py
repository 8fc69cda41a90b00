"""Work that is done beside training, in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from train.config import RunFailed


class Background:
    """One piece of work at a time, whose failure is raised where it is waited for.

    A process that ends without waiting ends at once, and the work with it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins `work`, once what was begun before is done. Raises what that raised."""
        self.wait()
        self._thread = Thread(target=self._run, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float | None = None) -> None:
        """Until all is done; raises what the work raised, and RunFailed if `seconds` do not
        suffice."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                raise RunFailed(f"{self._name} is not done after {seconds} seconds")
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
