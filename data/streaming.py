"""Datasets larger than the disk: their pictures pass once, and only what is made of them is kept.

The unit of work is a shard of the dataset. A process takes every so many of them and writes what it
saw of each into a file once all of it has been dealt with, so that a run that is killed goes on
with the shards that are not finished. Where there are fewer shards than processes, the rest idle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from data.columns import Columns, captions, find_columns
from data.examine import MAX_FILE_BYTES, READERS, reason
from data.files import Progress, silent
from data.hugging_face import (
    HUB,
    builder,
    checked,
    contained,
    demand_split,
    is_saved,
    measured,
    quiet,
    remedy,
    roots,
    splits,
)
from data.records import STREAM, Record, Table
from data.sources import Rejected, Source, complaint
from train.config import RunFailed, UserError

if TYPE_CHECKING:
    import datasets

VERSION = 1  # to be raised whenever a finished unit could hold something else now
ARCHIVED = re.compile(r"zip://[^:]*::")

T = TypeVar("T")
R = TypeVar("R")
Picture = tuple[Record, bytes]


@dataclass(frozen=True)
class Stream:
    """A dataset that has been opened but not read."""

    path: str
    units: int
    """Its shards."""
    fingerprint: str
    """Of its files (on the hub, of a commit), the split, the columns and the default caption."""
    recognised: str
    notes: list[str]
    columns: Columns
    caption: str | None
    dataset: datasets.IterableDataset = field(repr=False)

    def share(self, rank: int, world: int) -> range:
        """The units of one process."""
        return range(rank, self.units, world)

    def idle(self, world: int) -> list[str]:
        """A note where there are fewer shards than processes."""
        if self.units >= world:
            return []
        few = f"{self.path} has {self.units} shards, so {world - self.units} of {world} processes"
        return [f"{few} wait while it is streamed"]


def open_stream(
    path: str,
    *,
    caption: str | None = None,
    split: str = "train",
    revision: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Stream:
    """Opens `hf:OWNER/NAME`, or a folder or file that the `datasets` library can stream.

    No picture is read. Raises UserError for what the user can mend.
    """
    import datasets

    if not path.startswith(HUB) and is_saved(Path(path)):
        raise UserError(
            f"data.path={path} is on this disk as Arrow files already, and nothing is gained by "
            "streaming it: leave out data.streaming"
        )
    with quiet(path):
        made = builder(path, revision)
        demand_split(path, split, splits(made))
        dataset = made.as_streaming_dataset(split=split)
    features = dataset.features or datasets.Features()
    columns = find_columns(
        path,
        features,
        image_column=image_column,
        caption_column=caption_column,
        caption=caption,
    )
    dataset = dataset.select_columns(columns.names)
    if isinstance(features[columns.image], datasets.Image):
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    units = dataset.num_shards
    return Stream(
        path=path,
        units=units,
        fingerprint=_fingerprint(made, split, units, columns, caption),
        recognised=f"{units} shards of split {split} of {path}, streamed: {columns}",
        notes=columns.notes,
        columns=columns,
        caption=caption,
        dataset=dataset,
    )


def _fingerprint(
    made: datasets.DatasetBuilder, split: str, units: int, columns: Columns, caption: str | None
) -> str:
    files = [str(file) for file in (made.config.data_files or {}).get(split, [])]
    stamps = [_stamp(file) for file in files]  # names on the hub hold the commit
    facts = [VERSION, made.hash, stamps, split, units, columns.names, caption]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _stamp(file: str) -> list[Any]:
    if "://" in file:
        return [file]
    status = os.stat(file)
    return [file, status.st_size, status.st_mtime_ns]


# One unit ------------------------------------------------------------------------------------


def stream_unit(
    stream: Stream,
    unit: int,
    *,
    on_bad: Literal["abort", "report"],
    rejected: list[Rejected],
) -> Iterator[Picture]:
    """The records of one shard with their pictures' bytes, in order.

    Each picture has been decoded whole; a few are read ahead. What cannot be used is added to
    `rejected`, or raises UserError at once where on_bad="abort". Raises RunFailed where the dataset
    cannot be read on.
    """
    shard = stream.dataset.shard(num_shards=stream.units, index=unit)
    work = partial(_examined, stream=stream, unit=unit, allowed=roots(stream.path))
    for result in _ahead(work, enumerate(_read(shard, stream, unit))):
        if not isinstance(result, Rejected):
            yield result
        elif on_bad == "abort":
            raise UserError(complaint(f"data.path={stream.path}", [result]))
        else:
            rejected.append(result)


def _read(shard: Iterable[dict[str, Any]], stream: Stream, unit: int) -> Iterator[dict[str, Any]]:
    try:
        yield from shard
    except Exception as error:  # of the library, the hub or the network: any kind
        raise _broken_off(f"shard {unit} of {stream.path}", error) from error


def _broken_off(what: str, error: Exception) -> RunFailed:
    return RunFailed(
        f"{what} cannot be read to its end: {remedy(error)}; run the command again, which "
        "keeps the shards that are finished"
    )


def _examined(
    task: tuple[int, dict[str, Any]], stream: Stream, unit: int, allowed: Sequence[Path]
) -> Picture | Rejected:
    number, row = task
    id = f"shard {unit:05d} row {number:07d}"
    try:
        texts = captions(row.get(stream.columns.caption or ""), stream.caption)
        content = _content(row[stream.columns.image], stream.path, allowed)
        sha256, width, height = measured(content)
        return Record(id, STREAM, texts, width, height, sha256, file_bytes=len(content)), content
    except RunFailed:
        raise
    except Exception as error:  # a damaged picture can raise nearly anything in a decoder
        return Rejected(id, reason(error), STREAM)


def _content(picture: Any, path: str, allowed: Sequence[Path]) -> bytes:
    if isinstance(picture, bytes):
        return picture
    picture = picture or {}
    if picture.get("bytes") is not None:
        return picture["bytes"]
    return _fetched(picture.get("path"), path, allowed)


def _fetched(file: str | None, path: str, allowed: Sequence[Path]) -> bytes:
    """The bytes of a file of the dataset, on this machine or on the hub, maybe in an archive."""
    import fsspec

    archive = ARCHIVED.match(file or "")
    place = (file or "")[archive.end() if archive else 0 :]
    remote = path.startswith(HUB) and place.startswith(f"hf://datasets/{_name(path)}@")
    place = place if remote else contained(place, allowed)
    try:
        if archive or remote:
            opened = fsspec.open((archive[0] if archive else "") + place, "rb")
        else:
            opened = open(place, "rb")
        with opened as source:
            return source.read(MAX_FILE_BYTES + 1)
    except Exception as error:
        if not remote or isinstance(error, FileNotFoundError):
            raise
        # The network's fault, not the row's: nothing may be left out for it.
        raise _broken_off(path, error) from error


def _name(path: str) -> str:
    return path.removeprefix(HUB).partition(":")[0]


def _ahead(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, by several threads, in order; no more than a few pictures are held."""
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# All units -----------------------------------------------------------------------------------


def stream_records(
    stream: Stream,
    folder: Path,
    visit: Callable[[Iterator[Picture]], None],
    *,
    on_bad: Literal["abort", "report"] = "abort",
    rank: int = 0,
    world: int = 1,
    progress: Progress = silent,
) -> None:
    """Takes this process's unfinished units through `visit`, and writes each one's records.

    `visit` gets the pictures of one unit, and must have kept all that it makes of them when it
    returns: then the unit is finished. `progress(done, total)` counts this process's units. The
    caller waits for the other processes, and then calls `collect`.
    """
    mine, done = stream.share(rank, world), done_units(stream, folder)
    for count, unit in enumerate(mine, start=1):
        if unit not in done:
            records: list[Record] = []
            rejected: list[Rejected] = []
            pictures = stream_unit(stream, unit, on_bad=on_bad, rejected=rejected)
            visit(_noted(pictures, records))
            assert next(pictures, None) is None, "visit left pictures of its unit"
            finish_unit(stream, folder, unit, records, rejected)
        progress(count, len(mine))


def _noted(pictures: Iterator[Picture], records: list[Record]) -> Iterator[Picture]:
    for picture in pictures:
        records.append(picture[0])
        yield picture


def finish_unit(
    stream: Stream,
    folder: Path,
    unit: int,
    records: Iterable[Record],
    rejected: Sequence[Rejected],
) -> None:
    """Writes what a unit held, whole or not at all: from now on it is finished."""
    _write(stream, unit_file(folder, unit), records, rejected)


def done_units(stream: Stream, folder: Path) -> set[int]:
    """The units that are finished, and of this very stream."""
    units = range(stream.units)
    return {unit for unit in units if _written(stream, unit_file(folder, unit)) is not None}


def collect(
    stream: Stream, folder: Path, *, on_bad: Literal["abort", "report"] = "abort"
) -> Source:
    """All units as one source, in the order of the dataset, once every process is through."""
    units = [_written(stream, unit_file(folder, unit)) for unit in range(stream.units)]
    tables = [table for table in units if table is not None]
    if len(tables) < stream.units:
        missing = [unit for unit, table in enumerate(units) if table is None]
        raise RunFailed(f"shards {missing[:20]} of {stream.path} are not finished: stream it again")
    rejected = [Rejected(**bad) for table in tables for bad in table.about["rejected"]]
    table = _written(stream, folder / "all.arrow")
    if table is None:
        table = _write(stream, folder / "all.arrow", chain.from_iterable(tables), [])
    return checked(stream.path, Source(table, stream.recognised, stream.notes, rejected), on_bad)


def unit_file(folder: Path, unit: int) -> Path:
    """Where `finish_unit` writes what a unit held; without the file it is not finished."""
    return folder / f"unit-{unit:05d}.arrow"


def _written(stream: Stream, file: Path) -> Table | None:
    """What was written of this very stream."""
    try:
        table = Table.open(file)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError):
        return None
    return table if table.about.get("stream") == stream.fingerprint else None


def _write(
    stream: Stream, file: Path, records: Iterable[Record], rejected: Sequence[Rejected]
) -> Table:
    about = {"stream": stream.fingerprint, "rejected": [asdict(bad) for bad in rejected]}
    try:
        return Table.write(file, records, about)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; make room") from error
