"""The pictures of a dataset as rows of an Arrow file: read by memory map, so a million cost little.

A `Table` is a sequence of `Record`. What is in memory is the row being looked at, and the columns
of numbers that planning needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from data.files import whole
from train.config import UserError

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 3  # to be raised whenever a picture accepted before could be refused now
ROWS_AT_ONCE = 2048  # a row that is read brings its neighbours into memory
FILE, ROW, STREAM = "file:", "row:", "stream:"  # how a location begins


@dataclass(frozen=True, slots=True)
class Record:
    """One picture, its captions and what stands beside it."""

    id: str
    """Unique in its set: the path below the folder with "/" and in Unicode NFC, or the row."""
    location: str
    """Where its bytes are: `file:` and an absolute path, `row:` and a row of a Hugging Face
    dataset, or `stream:`, bytes that were seen once and are not kept."""
    captions: tuple[str, ...]
    """At least one; more where the dataset gives several."""
    width: int
    """Pixels, upright."""
    height: int
    sha256: str
    """Of the picture's bytes."""
    focus: tuple[float, float] | None = None
    """The point (x, y) that a focus crop keeps in the middle, from 0 to 1 of the upright sides."""
    mask: str | None = None
    """Absolute path of the picture's mask."""
    mask_sha256: str | None = None
    depth: str | None = None
    """Absolute path of the picture's depth map."""
    depth_sha256: str | None = None
    file_bytes: int = 0
    """Size of the file, and with `modified` what tells an index that it is the same."""
    modified: int = 0
    """Number made of the file's times of modification and of change and its inode, as
    `data.examine.stamp` makes it."""

    @property
    def path(self) -> Path | None:
        """The picture's file, where it is one."""
        return Path(self.location.removeprefix(FILE)) if self.location.startswith(FILE) else None

    def read(self) -> bytes:
        """The picture's bytes. Raises UserError where they cannot be had (again)."""
        if self.location.startswith(ROW):
            from data.hugging_face import read_row

            return read_row(self.location.removeprefix(ROW))
        if self.path is None:
            raise UserError(f"{self.id} was streamed and not kept: stream it again")
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error


class Table(Sequence[Record]):
    """Records in an Arrow table; `about` is what its file says of itself (JSON)."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.about: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"about", "{}"))
        self.widths = self._table["width"].to_numpy().astype(np.int32)  # (n,) pixels
        self.heights = self._table["height"].to_numpy().astype(np.int32)

    @classmethod
    def of(cls, records: Iterable[Record], about: Mapping[str, Any] | None = None) -> Table:
        """A table in memory."""
        import pyarrow as pa

        schema = _schema(about or {})
        return cls(pa.Table.from_batches(_batches(records, schema), schema))

    @classmethod
    def open(cls, path: Path) -> Table:
        """The table that `write` made, by memory map. Raises OSError or ValueError (of which
        Arrow's errors are kinds) for a file that is none."""
        import pyarrow as pa

        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        version = (table.schema.metadata or {}).get(b"version")
        if not table.schema.equals(_schema({})) or version != str(VERSION).encode():
            raise ValueError(f"{path} is a table of another version")
        table.validate(full=True)
        return cls(table)

    @classmethod
    def write(
        cls, path: Path, records: Iterable[Record], about: Mapping[str, Any] | None = None
    ) -> Table:
        """Writes records as they come, the file whole or not at all, and opens it."""
        import pyarrow as pa

        schema = _schema(about or {})
        with whole(path) as file, pa.ipc.new_file(file, schema) as writer:
            for batch in _batches(records, schema):
                writer.write_batch(batch)
        return cls.open(path)

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Record | Table:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return _record(self._table.slice(index % len(self), 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Record]:
        for batch in self._table.to_batches(max_chunksize=ROWS_AT_ONCE):
            yield from map(_record, batch.to_pylist())

    def take(self, indices: Sequence[int] | np.ndarray) -> Table:
        """The rows at these indices, in their order."""
        return Table(self._table.take(np.asarray(indices, dtype=np.int64)))

    def column(self, name: str) -> list[Any]:
        """One field of all rows."""
        return self._table[name].to_pylist()


class Joined(Sequence[Record]):
    """Several tables as one; ids begin with the table's name where there is more than one."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        assert tables
        self._names, self._tables = list(tables), list(tables.values())
        self._ends = np.cumsum([len(table) for table in self._tables])
        self.widths = np.concatenate([table.widths for table in self._tables])
        self.heights = np.concatenate([table.heights for table in self._tables])
        lengths = [len(table) for table in self._tables]
        self.sources = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        """Which table each row is from, (n,)."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        table = int(self.sources[index])
        start = int(self._ends[table]) - len(self._tables[table])
        return self._named(table, self._tables[table][index - start])

    def __iter__(self) -> Iterator[Record]:
        for number, table in enumerate(self._tables):
            yield from (self._named(number, record) for record in table)

    def _named(self, table: int, record: Record) -> Record:
        if len(self._tables) == 1:
            return record
        return replace(record, id=f"{self._names[table]}/{record.id}")


def _schema(about: Mapping[str, Any]) -> pa.Schema:
    import pyarrow as pa

    text, number, real = pa.string(), pa.int64(), pa.float64()
    kinds = {"captions": pa.list_(text), "focus": pa.list_(real)}
    kinds |= {name: number for name in ("width", "height", "file_bytes", "modified")}
    columns = [(field.name, kinds.get(field.name, text)) for field in fields(Record)]
    return pa.schema(columns, metadata={"about": json.dumps(dict(about)), "version": str(VERSION)})


def _batches(records: Iterable[Record], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    rest = iter(records)
    while rows := [asdict(record) for record in islice(rest, ROWS_AT_ONCE)]:
        yield pa.RecordBatch.from_pylist(rows, schema)


def _record(row: dict[str, Any]) -> Record:
    focus = row.pop("focus")
    captions = tuple(row.pop("captions"))
    return Record(**row, captions=captions, focus=None if focus is None else tuple(focus))
