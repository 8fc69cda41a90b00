"""What a command shows: its first and last screen, bars, notes, and events for programs.

One of three ways: plain text for people (the default), only errors and the result's path (--quiet),
or JSON lines on stdout with all other text on stderr (--json). Of several processes the first
alone speaks through here. Imports nothing of this project and nothing heavy.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

Row = tuple[str, str]
"""A label of at most 8 letters, and what it says."""

WIDTH = 100  # characters of a screen's lines, at the most
LABEL = 9  # columns of a label, with the space after it
_TICK = 1.0  # seconds between two signs of life, and before the first
LINE_EVERY = 30.0  # seconds between two lines of progress where stderr is no terminal
FLAGS = {
    "--quiet": "print errors and the path of the result, nothing else",
    "--json": "print one JSON object per line on stdout (plan, step, done, error), text on stderr",
    "--no-color": "no bold and dim text; the variable NO_COLOR does the same",
}


@dataclass(frozen=True)
class Way:
    """How a command speaks."""

    quiet: bool = False
    json: bool = False
    colour: bool = True
    out: IO[str] | None = None
    """Where results and events go where stdout is taken for other text; None: stdout."""


_way = Way()
_is_done = False
_began = time.monotonic()


def since_start() -> float:
    """Seconds since the command began, but for Python's own start."""
    return time.monotonic() - _began


def split(arguments: Sequence[str]) -> tuple[list[str], Way]:
    """The arguments without FLAGS, wherever they stand, and what these say."""
    given = {argument for argument in arguments if argument in (*FLAGS, "--no-colour")}
    rest = [argument for argument in arguments if argument not in given]
    plain = {"--no-color", "--no-colour"} & given
    return rest, Way("--quiet" in given, "--json" in given, not plain)


@contextmanager
def speaking(way: Way) -> Iterator[None]:
    """Within it everything is said that way, also what others print on stdout."""
    global _way, _is_done
    before, stdout = (_way, _is_done), sys.stdout
    _way, _is_done = Way(way.quiet, way.json, way.colour, stdout), False
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            if way.json:
                sys.stdout = sys.stderr
            elif way.quiet:
                sys.stdout = nowhere
            yield
            if not _is_done:
                event("done")
        finally:
            sys.stdout = stdout
            _way, _is_done = before


class _Lossy:
    """A stream that leaves out what cannot be written: its disk is full, its reader is gone."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lossy(stream: Any) -> Any:
    return stream if stream is None or isinstance(stream, _Lossy) else _Lossy(stream)


@contextmanager
def unheard() -> Iterator[None]:
    """Within it nothing ends because it cannot be said, as on a full disk or a closed pipe: text is
    left out instead, also what others print."""
    global _way
    atexit.unregister(_settle)  # once is enough
    atexit.register(_settle)
    before = _way, sys.stdout, sys.stderr
    _way = replace(_way, out=_lossy(_way.out))
    sys.stdout, sys.stderr = map(_lossy, (sys.stdout, sys.stderr))
    try:
        yield
    finally:
        _way, sys.stdout, sys.stderr = before


def _settle() -> None:
    """Python flushes streams when it ends, and what is left in one would make a failure of it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # a stream that is no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_first() -> bool:
    """Whether this is the process that speaks."""
    return os.environ.get("RANK", "0") == "0"


def is_for_programs() -> bool:
    return _way.json


# Text


def say(text: str) -> None:
    """A line, or several, for people."""
    if is_first():
        print(text, flush=True)


def warn(text: str) -> None:
    """What somebody should look at; an event as well."""
    say(f"{bold('warning')}: {text}")
    event("warning", text=text)


def screen(title: str, rows: Iterable[Row]) -> None:
    """A block of aligned lines under a title, after an empty one: what a run is about to do, or has
    done.

    On a terminal rows are wrapped; in a log each is a line, to be searched. A row without a label
    goes on with the one before it, and stands as it is, however long.
    """
    say("\n".join(["", bold(title), *(line for row in rows for line in _lines(*row))]))


def _lines(label: str, text: str) -> list[str]:
    if not label:  # a command to be copied: a line break would be part of it
        return [f"{'':{LABEL}}{text}".rstrip()]
    if not _is_terminal(sys.stdout):
        return [f"{label:<{LABEL}}{text}"]
    width = min(WIDTH, shutil.get_terminal_size().columns) - LABEL
    wrapped = textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)
    heads = [dim(f"{label:<{LABEL}}")] + [" " * LABEL] * len(wrapped)
    return [f"{head}{line}" for head, line in zip(heads, wrapped or [""], strict=False)]


def bold(text: str) -> str:
    return _styled(text, "1")


def dim(text: str) -> str:
    return _styled(text, "2")


def _styled(text: str, code: str) -> str:
    plain = not _way.colour or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not _is_terminal(sys.stdout) else f"\033[{code}m{text}\033[0m"


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


# For programs


def event(name: str, **facts: Any) -> None:
    """One line of JSON, where these are asked for."""
    if _way.json and is_first():
        _write(json.dumps({"event": name, **facts}, default=str))


def done(result: Path | str | None = None, **facts: Any) -> None:
    """That the command has done what it was asked to, and where the result is."""
    global _is_done
    _is_done = True
    event("done", result=result, **facts)
    if _way.quiet and not _way.json and result is not None and is_first():
        _write(str(result))


def _write(line: str) -> None:
    print(line, file=_way.out or sys.stdout, flush=True)


# Progress


class Lines:
    """Progress where nobody watches: a line every LINE_EVERY seconds, none for what is short."""

    def __init__(self, total: int | None, what: str, *, unit: str, initial: int = 0) -> None:
        self.total, self.n = total, initial
        self._what, self._unit, self._first = what, unit, initial
        self.start_t = self.last_print_t = time.monotonic()  # named as in tqdm
        self._notes = ""

    def update(self, count: float = 1) -> None:
        self.n += int(count)
        self.refresh()

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self.last_print_t >= LINE_EVERY:
            self.last_print_t = now
            with suppress(OSError):
                print(self._line(now - self.start_t), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        if not self.total:
            return f"{self._what}: {duration(seconds)} so far"
        left = seconds * (self.total - self.n) / max(self.n - self._first, 1)
        unit = f" {self._unit}" if self._unit else ""
        known = f", about {duration(left)} left" if self.n > self._first else ""
        return f"{self._what}: {self.n} of {self.total}{unit}{known}{self._notes}"

    def set_postfix(self, **notes: Any) -> None:
        self._notes = "".join(f", {name} {value}" for name, value in notes.items())

    def set_description(self, what: str) -> None:
        self._what = what

    def close(self) -> None:
        """No last line: what has been done says so."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Nothing(Lines):
    """Progress that is not shown."""

    def refresh(self) -> None:
        return


def bar(
    total: int | None,
    what: str,
    *,
    unit: str = "",
    initial: int = 0,
    shown: bool = True,
    leave: bool = False,
    delay: float = 1.0,
) -> Any:
    """The progress of what takes long, on stderr: what it is, how much of it is done, how fast it
    goes and how long it still takes. With the methods of a tqdm bar: update, set_postfix, close.

    shown: False in all processes but one. leave: whether it stays there once done. delay: seconds
    before it is shown. Silent in --quiet and --json; plain lines where stderr is no terminal.
    """
    if not shown or _way.quiet or _way.json:
        return Nothing(total, what, unit=unit, initial=initial)
    if not _is_terminal(sys.stderr):
        return Lines(total, what, unit=unit, initial=initial)
    from tqdm import tqdm

    counted = "{desc}: {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt} {unit}, {rate_fmt}, "
    return tqdm(
        desc=what,
        file=_lossy(sys.stderr),
        total=total,
        initial=initial,
        unit=unit,
        leave=leave,
        delay=delay,
        mininterval=0.5,
        dynamic_ncols=True,
        bar_format=f"{counted}{{remaining}} left{{postfix}}" if total else "{desc}: {elapsed}",
    )


def track(items: Iterable[T], what: str, *, total: int, **options: Any) -> Iterator[T]:
    """Passes items through, with a bar."""
    with bar(total, what, **options) as shown:
        for item in items:
            yield item
            shown.update()


def leave_out(shown: Any, seconds: float) -> None:
    """Takes time that did not go into what a bar counts out of its rate and what it has left."""
    shown.start_t += seconds
    shown.last_print_t += seconds


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[None]:
    """A sign of life for what cannot be counted, like loading a model: how long it has taken."""
    ended = threading.Event()
    watch = threading.Thread(target=_tick, args=(what, shown and is_first(), ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _tick(what: str, shown: bool, ended: threading.Event) -> None:
    if ended.wait(_TICK):
        return
    # Not a bar with a delay: close() would not erase it, as refresh() does not count as shown.
    with bar(None, what, shown=shown, delay=0.0) as sign:
        leave_out(sign, -_TICK)
        sign.refresh()
        while not ended.wait(_TICK):
            sign.refresh()


# Words for numbers


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def amount(count: float) -> str:
    """ "640 k", "3.3 M", "1.2 G" of parameters; small numbers as they are."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            unit = 1e3 if name == "k" else size
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f}"


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
