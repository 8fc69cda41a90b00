"""Files made beside pictures, such as captions and depth maps: which pictures lack theirs, and the
walk that decodes those in threads while the model is at work on the ones before."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.companions import split_pictures
from data.examine import READERS, reason
from data.files import Progress, silent, write_atomically
from data.listing import CAPTION_EXTENSIONS, extension, first, list_folder, shown
from train.config import UserError

NOT_PICTURES = (*CAPTION_EXTENSIONS, ".json", ".jsonl", ".csv", ".parquet")
LONGEST_NAME = 255 - 24  # bytes: the temporary name of write_atomically is the longer one

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """The pictures of a resolved folder by id, sorted, and what cannot be used there and why."""

    folder: Path
    files: dict[str, Path]
    problems: dict[str, str]


def find(source: Path) -> Found:
    """The pictures in `source` and below; the masks and depth maps of others are none.

    Raises UserError where it is not a folder or holds no pictures.
    """
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "does not exist"
        raise UserError(f"source={source} {what}: give the folder that holds the pictures")
    listing = list_folder(source)
    names, _ = split_pictures(listing)
    problems = {n: p for n, p in listing.problems.items() if extension(n) not in NOT_PICTURES}
    if not names and not problems:
        raise UserError(f"source={source} holds no pictures: give the folder that does")
    return Found(listing.folder, {name: listing.files[name] for name in names}, problems)


def targets(found: Found, suffix: str, output: Path | None = None) -> dict[str, Path]:
    """Where each picture's file goes: NAME + suffix beside it, or in the same place below `output`.

    Pictures that would share one, and names that get too long, are added to the problems instead.
    """
    made: dict[str, Path] = {}
    owners: dict[Path, str] = {}
    for name, path in found.files.items():
        below = path.relative_to(found.folder) if output is not None else path
        target = (output or Path()) / below.with_name(below.stem + suffix)
        owner = owners.setdefault(target, name)
        if owner != name:
            found.problems[name] = f"would share {target.name} with {shown(owner)}: rename one"
        elif len(os.fsencode(target.name)) > LONGEST_NAME:
            found.problems[name] = f"its name is too long to have {suffix} added: shorten it"
        else:
            made[name] = target
    return made


def share(names: Sequence[str], rank: int, world: int) -> list[str]:
    """What process `rank` of `world` is to do of all pictures, those that are done among them.

    Never to be taken of what is missing: each process would see another part of it done already.
    """
    return list(names[rank::world])


def decoded(
    files: Mapping[str, Path],
    read: Callable[[Path], T],
    *,
    batch_size: int,
    problems: MutableMapping[str, str],
    progress: Progress = silent,
) -> Iterator[list[tuple[str, T]]]:
    """Batches of (id, what `read` makes of the file), in order; threads read two batches ahead.

    A file on which `read` raises is left out of the batches and added to `problems` with the
    reason. `progress(done, total)` counts files once the batch they are in has been dealt with.
    """
    batch: list[tuple[str, T]] = []
    for done, (name, result) in enumerate(_read_ahead(files, read, 2 * batch_size), start=1):
        if isinstance(result, Exception):
            problems[name] = reason(result)
        else:
            batch.append((name, result))
        if len(batch) == batch_size or (batch and done == len(files)):
            yield batch
            batch = []
            progress(done, len(files))
    progress(len(files), len(files))


def _read_ahead(
    files: Mapping[str, Path], read: Callable[[Path], T], ahead: int
) -> Iterator[tuple[str, T | Exception]]:
    pending: deque[tuple[str, Future[T | Exception]]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for name, path in files.items():
            pending.append((name, pool.submit(_read, read, path)))
            if len(pending) > ahead:
                first_name, future = pending.popleft()
                yield first_name, future.result()
        for name, future in pending:
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(read: Callable[[Path], T], path: Path) -> T | Exception:
    try:
        return read(path)
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        return error


def write(target: Path, content: bytes) -> None:
    """The whole file or none of it. Raises UserError where it cannot be written."""
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UserError(
            f"cannot write {shown(str(target))}: {error.strerror or error}; make room or give "
            "write permission there, then repeat the command, which goes on where it was"
        ) from error


def named(problems: Mapping[str, str]) -> str:
    """The problems as indented lines, the first 20 by name."""
    return "\n".join(
        f"  {line}" for line in first([f"{shown(n)}: {why}" for n, why in sorted(problems.items())])
    )
