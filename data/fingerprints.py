"""One look at every picture: small copies to find duplicates with, and what is odd about its file.

Kept in a file under the hash of the picture's bytes, so that no picture is looked at twice.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.duplicates import SIDE, Prints, print_of
from data.examine import READERS, reason
from data.files import Progress
from data.images import FORMATS, Colour, open_image, orientation
from data.records import Record
from train.config import UserError

VERSION = 2  # to be raised whenever a picture would get other copies or other oddities
ODDITIES = {
    "sideways": "turned upright, as the orientation in the file says",
    "transparent": "laid over the background colour where they are transparent",
    "cmyk": "converted from the colours of print (CMYK)",
    "animated": "animations, of which the first frame is taken",
    "deep": "16 bits per channel, brought to 8",
}
_ROW = np.dtype(
    [
        ("sha256", "S64"),
        ("oddities", "u1"),
        ("print", "u1", (SIDE, SIDE, 3)),
        ("check", "<u4"),
    ]
)
_AT_ONCE = 256


class Fingerprints:
    """Of n pictures: `rows[index[k]]` is the k-th one's."""

    def __init__(self, rows: np.ndarray, index: np.ndarray) -> None:
        self._rows, self._index = rows, index

    def __len__(self) -> int:
        return len(self._index)

    def prints(self) -> Prints:
        """The small copies of all, in order: 3 KB each, by memory map."""
        return Prints(self._rows["print"], self._index)

    def union(self, other: Fingerprints) -> Prints:
        """The copies of these pictures and then of the other's, which were looked at later and so
        are in the same file."""
        assert len(other._rows) >= len(self._rows)
        return Prints(other._rows["print"], np.concatenate([self._index, other._index]))

    def odd(self, name: str) -> np.ndarray:
        """bool (n,): which pictures have this one of the ODDITIES."""
        bit = 1 << list(ODDITIES).index(name)
        return (self._rows["oddities"][self._index] & bit) > 0


def fingerprints(
    records: Sequence[Record], folder: Path, background: Colour, progress: Progress
) -> Fingerprints:
    """Looks at those pictures that `folder` does not know yet, several at once.

    The file is added to as the work goes on, each row with a checksum: what is written when the
    work is broken off is not done again. Raises UserError for a picture that has changed since it
    was listed, and where the file cannot be written.
    """
    file = folder / f"fingerprints-{VERSION}-{'-'.join(map(str, background))}.bin"
    known = _index_of(_read(file))
    missing = list(_missing(records, known))
    done = len(records) - len(missing)
    try:
        with file.open("ab") as stream, ThreadPoolExecutor(READERS) as pool:
            rest = iter(missing)
            while batch := [records[k] for k in islice(rest, _AT_ONCE)]:
                looks = list(pool.map(lambda record: _look(record, background), batch))
                stream.write(np.array(looks, _ROW).tobytes())
                stream.flush()
                done += len(batch)
                progress(done, len(records))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    rows = _read(file)
    places = _index_of(rows)
    index = [places[record.sha256.encode()] for record in records]
    return Fingerprints(rows, np.array(index, np.int64))


def _missing(records: Sequence[Record], known: dict[bytes, int]) -> Iterator[int]:
    seen: set[bytes] = set()
    for k, record in enumerate(records):
        sha256 = record.sha256.encode()
        if sha256 not in known and sha256 not in seen:
            seen.add(sha256)
            yield k


def _read(file: Path) -> np.ndarray:
    """The rows by memory map; a torn end is cut off, so that what is added stays in line."""
    try:
        size = file.stat().st_size
    except OSError:
        return np.empty(0, _ROW)
    if size % _ROW.itemsize:
        os.truncate(file, size - size % _ROW.itemsize)
    count = size // _ROW.itemsize
    return np.memmap(file, _ROW, "r", shape=(count,)) if count else np.empty(0, _ROW)


def _index_of(rows: np.ndarray) -> dict[bytes, int]:
    return {
        bytes(row["sha256"]): place for place, row in enumerate(rows) if row["check"] == _check(row)
    }


def _check(row: Any) -> int:
    return zlib.crc32(row.tobytes()[: -_ROW["check"].itemsize])


def _look(record: Record, background: Colour) -> np.ndarray:
    content = record.read()
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise UserError(f"{record.id} was changed while it was being read: run this again")
    row = np.zeros((), _ROW)
    try:
        row["sha256"], row["oddities"] = record.sha256, _oddities(content)
        image = open_image(io.BytesIO(content), background, cover=(2 * SIDE, 2 * SIDE))
        row["print"] = print_of(image)
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise UserError(
            f"{record.path or record.id} {reason(error)}: mend it or take it out of the source"
        ) from error
    row["check"] = _check(row)
    return row


def _oddities(content: bytes) -> int:
    """Bits in the order of ODDITIES, from the header alone."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        present = (
            orientation(image) != 1,
            image.has_transparency_data,
            image.mode == "CMYK",
            image.format != "MPO" and _animated(image),
            image.mode.startswith("I;16"),
        )
    return sum(bit << k for k, bit in enumerate(present))


def _animated(image: Image.Image) -> bool:
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # what comes after the first frame is damaged; it is not used
        return True
