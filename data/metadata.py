"""metadata.jsonl, metadata.csv and metadata.parquet: one entry for each picture of a folder."""

from __future__ import annotations

import csv
import json
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from data import companions
from data.captions import Layout
from data.companions import Focus, Kind
from data.images import EXTENSIONS
from data.listing import CAPTION_EXTENSIONS, MAX_TEXT_BYTES, Listing, Tally, extension, shown
from train.config import UserError

if TYPE_CHECKING:
    import pyarrow as pa

CAPTION_KEYS = ("text", "caption", "captions", "prompt")
MAX_LINE_BYTES = 1 << 20
IN_MEMORY = 8 << 20  # bytes of entries; more are kept in a temporary file

Lines = Iterator[tuple[int, Mapping[str, Any] | str]]  # number from 1; an entry, or what is wrong


class Metadata(Layout):
    """The pictures that a metadata file lists, with its captions, focus points, masks and depth.

    Entries are kept as JSON lines in a file of their own, and in memory only where each begins.
    """

    def __init__(self, listing: Listing, file: str, column: str | None) -> None:
        super().__init__(listing)
        self._file = file
        self._keys = (column,) if column else CAPTION_KEYS
        self._seen: set[str] = set()  # which of the keys some line has
        self._entries = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        self._starts = np.full(len(listing.names), -1, dtype=np.int64)
        self._companions = np.zeros(len(listing.names), dtype=bool)
        self._lock = threading.Lock()
        if file in listing:
            for number, line in _read(listing.path(file), self._keys):
                self._take(number, line)
        listed = np.flatnonzero(self._starts >= 0)
        self.pictures = [listing.names[at] for at in listed]
        if not len(listed) and not listing.problems:
            raise UserError(f"{listing.folder / file} lists no pictures: list them, or remove it")
        if column and len(listed) and not self._seen:
            raise UserError(
                f"data.caption_column={column}: no line of {listing.folder / file} has it; name "
                "the one that holds the captions"
            )
        self.recognised = f"{len(listed)} pictures listed in {file}, which {listing.folder} holds"
        self._note_unused()

    def captions(self, name: str) -> tuple[str, ...]:
        return tuple(self._entry(name)["captions"])

    def focus(self, name: str) -> Focus | None:
        point = self._entry(name)["focus"]
        return super().focus(name) if point is None else (point[0], point[1])

    def companion(self, name: str, kind: Kind) -> str | None:
        return self._entry(name)[kind] or super().companion(name, kind)

    def _entry(self, name: str) -> dict[str, Any]:
        with self._lock:
            self._entries.seek(int(self._starts[self.listing.position(name)]))
            return json.loads(self._entries.readline())

    def _take(self, number: int, line: Mapping[str, Any] | str) -> None:
        """Keeps an entry, or the problem with it under the picture's name or the line's."""
        problems, where = self.listing.problems, f"{self._file}:{number}"
        name = None
        try:
            if isinstance(line, str):
                raise ValueError(line)
            name = self._picture(line)
            entry = self._checked(line)
        except ValueError as error:
            if name is None:
                problems[where] = str(error)
            else:
                problems[name] = f"{where}: {error}"
            return
        self._starts[self.listing.position(name)] = self._entries.tell()
        self._entries.write(json.dumps(entry).encode() + b"\n")

    def _picture(self, line: Mapping[str, Any]) -> str:
        if not isinstance(line.get("file_name"), str) or not line["file_name"]:
            raise ValueError('needs "file_name", the path of a picture below the folder')
        name = self._contained("file_name", line["file_name"])
        if extension(name) not in EXTENSIONS:
            kinds = " ".join(sorted(EXTENSIONS))
            raise ValueError(f"file_name {shown(name)} is no picture ({kinds})")
        if self._starts[self.listing.position(name)] >= 0:
            raise ValueError(f"lists {shown(name)} a second time: remove one")
        return name

    def _checked(self, line: Mapping[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = {"captions": self._texts(line), "focus": None}
        if line.get("focus") not in (None, ""):
            entry["focus"] = companions.read_focus(_numbers(line["focus"]), '"focus"')
        for kind in companions.KINDS:
            entry[kind] = self._contained(kind, line[kind]) if line.get(kind) else None
            if entry[kind] is not None:
                self._companions[self.listing.position(entry[kind])] = True
        return entry

    def _texts(self, line: Mapping[str, Any]) -> list[str]:
        self._seen.update(key for key in self._keys if key in line)
        key = next((key for key in self._keys if not _is_blank(line.get(key))), None)
        if key is None:
            return []
        texts = [line[key]] if isinstance(line[key], str) else line[key]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'"{key}" must be a string, or a list of strings')
        return [text for text in (_clean(text, key) for text in texts) if text]

    def _contained(self, key: str, value: Any) -> str:
        """The id of the file that is named; never one outside the folder."""
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a string, the path of a file below the folder')
        path = PurePosixPath(value)
        name = unicodedata.normalize("NFC", path.as_posix())
        foreign = "\\" in value and name not in self.listing  # in a name it may stand, on Linux
        if path.is_absolute() or ".." in path.parts or foreign or "://" in value:
            raise ValueError(f"{key} {shown(value)} must be a path below the folder, with /")
        if name not in self.listing:
            why = self.listing.problems.get(name, "is not in the folder: mend the name")
            raise ValueError(f"{key} {shown(value)} {why}")
        return name

    def _note_unused(self) -> None:
        pictures, texts = Tally(), Tally()
        for at, name in enumerate(self.listing.names):
            if extension(name) in CAPTION_EXTENSIONS:
                texts.add(name)
            elif extension(name) in EXTENSIONS and self._starts[at] < 0:
                aside = self._companions[at] or companions.is_companion(self.listing, name)
                if not aside and name not in self.listing.problems:
                    pictures.add(name)
        self.listing.notes += pictures.note(f"pictures that {self._file} does not list, not used")
        self.listing.notes += texts.note(f"text files, not used as {self._file} holds the captions")


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _clean(text: str, key: str) -> str:
    if not _is_unicode(text) or "\0" in text:
        raise ValueError(f'"{key}" is not UTF-8, or holds NUL: save the file as UTF-8')
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f'"{key}" has more than {MAX_TEXT_BYTES} characters: shorten it')
    return " ".join(text.split())


def _is_unicode(text: str) -> bool:
    """Lone surrogates come from "\\ud800" in JSON, and from bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _numbers(value: Any) -> Any:
    """The numbers in a cell of a csv, which are a string there."""
    return value.strip(" []()").replace(",", " ").split() if isinstance(value, str) else value


# Three kinds of file to lines ----------------------------------------------------------------


def _read(path: str, keys: Sequence[str]) -> Lines:
    try:
        if path.endswith(".jsonl"):
            yield from _json_lines(path)
        elif path.endswith(".csv"):
            yield from _csv_lines(path, keys)
        else:
            yield from _parquet_rows(path, keys)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; mend it") from error


def _json_lines(path: str) -> Lines:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                yield number, f"has more than {MAX_LINE_BYTES} bytes: shorten it"
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
            elif stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, _parse(stripped)


def _parse(line: bytes) -> Mapping[str, Any] | str:
    try:
        entry = json.loads(line)
    except UnicodeDecodeError:
        return "is not UTF-8: save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error}): write one object on each line"
    if not isinstance(entry, dict):
        return 'is not an object with "file_name" and "text"'
    return entry


def _csv_lines(path: str, keys: Sequence[str]) -> Lines:
    # Bytes that are not UTF-8 become surrogates, so that the line they are in can be named.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file, strict=True)
        header = None
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield rows.line_num, f"is not CSV ({error}): quote its cells rightly"
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _used(header, path, keys)
            elif len(cells) > len(header):
                yield (
                    rows.line_num,
                    "has more cells than there are columns: quote its texts",
                )
            elif cells:
                yield rows.line_num, dict(zip(header, cells, strict=False))


def _used(columns: list[str], path: str, keys: Sequence[str]) -> list[str]:
    """Those of the columns that are read. Raises UserError where that is not clear."""
    if "file_name" not in columns:
        found = ", ".join(shown(column) for column in columns[:20]) or "none"
        raise UserError(
            f"{path} needs a column file_name, and one for the captions, text (in a csv parted by "
            f"commas); its columns are: {found}"
        )
    used = [name for name in columns if name in {"file_name", "focus", *companions.KINDS, *keys}]
    twice = next((name for name in used if used.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has more than one column {shown(twice)}: keep one of them")
    return used


def _parquet_rows(path: str, keys: Sequence[str]) -> Lines:
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = _used(file.schema_arrow.names, path, keys)
            batches = file.iter_batches(batch_size=1024, columns=columns)
            yield from enumerate((row for batch in batches for row in _rows(batch)), start=1)
    except (UserError, OSError):
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        why = shown(str(error) or type(error).__name__)
        raise UserError(f"{path} is not a parquet file that can be read ({why})") from error


def _rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any] | str]:
    """The rows of a batch; of one that is no text or no number Python has, what is wrong."""
    try:
        yield from batch.to_pylist()
    except ValueError:
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield "is not UTF-8: save the file as UTF-8"
            except ValueError as error:
                yield f"cannot be read ({error}): mend it"
