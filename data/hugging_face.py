"""Hugging Face datasets, on a disk or on the hub, as sources of pictures.

A picture stays where it is: in a row of the Arrow files that the `datasets` library keeps, or in a
file that the row names. Only below the dataset's own folder and that library's caches is anything
read, and no code of a dataset is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, tee
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from data.columns import Columns, captions, find_columns, picture_columns
from data.examine import (
    MAX_FILE_BYTES,
    Facts,
    decoded_size,
    examine,
    in_order,
    load,
    locked,
    reason,
    remembered,
    stamp,
    store,
    wrong_size,
)
from data.files import Progress
from data.listing import METADATA, Tally, shown
from data.records import FILE, ROW, Record
from data.sources import Rejected, Source, complaint
from train.config import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

T = TypeVar("T")

HUB = "hf:"
_DEEPEST = 2  # folders below the dataset's in which its parquet files may lie: PART/SPLIT/
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
OPEN_FILES = 128


def is_dataset(path: str) -> bool:
    """Whether it is `hf:OWNER/NAME`, a folder of `save_to_disk`, a .parquet file, or a folder with
    parquet files that hold pictures."""
    place = Path(path)
    if path.startswith(HUB) or is_saved(place):
        return True
    if place.is_file():
        return place.suffix.lower() == ".parquet"
    return any(_holds_pictures(file) for file in _parquet_files(place))


def _parquet_files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        place = Path(parent)
        deep = len(place.relative_to(folder).parts) >= _DEEPEST
        folders[:] = [] if deep else [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.endswith(".parquet") and name not in METADATA:
                yield place / name


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it, of one split or of several."""
    one = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (folder / "dataset_dict.json").is_file()


def _holds_pictures(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from datasets import Features

    if not file.is_file():  # to open a pipe would take for ever
        return False
    try:
        return bool(picture_columns(Features.from_arrow_schema(parquet.read_schema(file))))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return False


# Opening -------------------------------------------------------------------------------------


@contextmanager
def quiet(path: str) -> Iterator[None]:
    """The library without its bars and warnings, and its errors as a user's mistake."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of its own, the hub's, Arrow's and the system's: any kind
        raise UserError(f"data.path={path}: {remedy(error)}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def remedy(error: Exception) -> str:
    """What went wrong in the library or on the hub, and what to do about it."""
    from datasets.exceptions import DatasetNotFoundError

    said = shown(" ".join(str(error).split())[:300]) or type(error).__name__
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{said} Check the name and data.revision; for a private or gated dataset, accept its "
            "terms on its page and log in with `hf auth login`"
        )
    if isinstance(error, ConnectionError) or "offline" in said.lower():
        return (
            f"the hub cannot be reached ({said}): check the connection, and that HF_HUB_OFFLINE "
            "is not set; a dataset that was loaded here before is found without"
        )
    if "onfig name is missing" in said:
        return f"{said}: it has several parts, name one as {HUB}OWNER/NAME:PART"
    return f"cannot be loaded by the `datasets` library: {said}"


def builder(path: str, revision: str | None) -> datasets.DatasetBuilder:
    """What the library makes of a name on the hub, a folder or a parquet file. Within `quiet`."""
    from datasets import load_dataset_builder

    if path.startswith(HUB):
        name, part = _hub_name(path)
        return load_dataset_builder(name, part, revision=revision)
    place = Path(path).resolve()
    if place.is_file():
        made = load_dataset_builder("parquet", data_files={"train": str(place)})
    else:
        made = load_dataset_builder(str(place))
    _demand_contained(path, chain.from_iterable((made.config.data_files or {}).values()))
    return made


def _hub_name(path: str) -> tuple[str, str | None]:
    match = _HUB_NAME.fullmatch(path.removeprefix(HUB))
    if match is None:
        raise UserError(f"data.path={path}: a dataset on the hub is named {HUB}OWNER/NAME")
    if Path(match[1]).exists():  # the library would take that one
        raise UserError(
            f"data.path={path}: a folder {match[1]} lies here, so it is not clear which is meant; "
            "start from another folder, or give the folder's full path"
        )
    return match[1], match[2]


def _demand_contained(path: str, files: Iterable[str]) -> None:
    """That a dataset's own files are regular, and lie where they may."""
    allowed = roots(path)
    for file in files:
        try:
            contained(file, allowed)
        except ValueError as error:
            raise UserError(f"data.path={path} {error}") from None


def roots(path: str) -> list[Path]:
    """Where a dataset's pictures may lie, if they are files: its own folder, where it has one, and
    what the library has downloaded."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = [Path(HF_DATASETS_CACHE).resolve(), Path(HF_HUB_CACHE).resolve()]
    if path.startswith(HUB):
        return caches
    place = Path(path).resolve()
    return [place if place.is_dir() else place.parent, *caches]


def splits(made: datasets.DatasetBuilder) -> list[str]:
    """Their names, as far as they are known before anything is read."""
    return [str(name) for name in made.info.splits or made.config.data_files or ()]


def demand_split(path: str, split: str, known: Sequence[str]) -> None:
    if known and split not in known:
        raise UserError(
            f"data.split={split}: {path} has no such split, but {', '.join(known)}; "
            f"set data.split={known[0]}"
        )


def _open(path: str, split: str, revision: str | None) -> datasets.Dataset:
    import datasets

    with quiet(path):
        if not path.startswith(HUB) and is_saved(Path(path)):
            saved = datasets.load_from_disk(str(Path(path).resolve()))
            if isinstance(saved, datasets.Dataset):
                saved = datasets.DatasetDict({str(saved.split or "train"): saved})
            demand_split(path, split, list(saved))
            return saved[split]
        made = builder(path, revision)
        demand_split(path, split, splits(made))
        made.download_and_prepare()
        demand_split(path, split, splits(made))
        return made.as_dataset(split=split)


# Scanning ------------------------------------------------------------------------------------


class _Row(NamedTuple):
    id: str
    file: str  # the Arrow file it is in
    at: int  # its number there
    stamp: tuple[int, int]  # that file's, as `data.examine.stamp` makes it
    picture: pa.Scalar
    texts: pa.Scalar | None


def scan_dataset(
    path: str,
    *,
    index: Path | None,
    caption: str | None,
    on_bad: Literal["abort", "report"],
    split: str,
    revision: str | None,
    image_column: str | None,
    caption_column: str | None,
    progress: Progress,
) -> Source:
    """The rows of a dataset whose pictures can all be decoded, in their order.

    The arguments are those of `data.sources.scan`. With `index`, a row is not read again as long as
    the Arrow file it is in is the same. Raises UserError for what the user can mend.
    """
    dataset = _open(path, split, revision)
    columns = find_columns(
        path,
        dataset.features,
        image_column=image_column,
        caption_column=caption_column,
        caption=caption,
    )
    files = [file["filename"] for file in dataset.cache_files]
    _demand_contained(path, files)
    rows = _rows(files, columns)
    work = partial(_examined, column=columns.image, caption=caption, allowed=roots(path))
    rejected: list[Rejected] = []
    with locked(index) as lock:
        known = load(index)
        results = counted(in_order(work, _paired(rows, known)), len(dataset), progress)
        table = store(index, usable(results, rejected), known, lock)
    recognised = f"{len(dataset)} rows of split {split} of {path}, {_why(path)}: {columns}"
    return checked(path, Source(table, recognised, columns.notes, rejected), on_bad)


def checked(path: str, source: Source, on_bad: str) -> Source:
    """The source, if it can be used as it is; with a note on what is left out."""
    if source.rejected and (on_bad == "abort" or not len(source.table)):
        raise UserError(complaint(f"data.path={path}", source.rejected))
    if not len(source.table):
        raise UserError(f"data.path={path} holds no rows in this split: choose another, data.split")
    left_out = Tally([f"{bad.id}: {bad.reason}" for bad in source.rejected]).note("left out")
    return replace(source, notes=[*source.notes, *left_out])


def counted(results: Iterable[T], total: int, progress: Progress) -> Iterator[T]:
    """The results, their number told to `progress` as they come."""
    for done, result in enumerate(results, start=1):
        yield result
        progress(done, total)


def usable(results: Iterable[T | Rejected], rejected: list[Rejected]) -> Iterator[T]:
    """The results that are none of the rejected; those are added to the list."""
    for result in results:
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            yield result


def _why(path: str) -> str:
    if path.startswith(HUB):
        return "a dataset on the Hugging Face hub"
    if is_saved(Path(path)):
        return "which save_to_disk wrote"
    return "which holds pictures in parquet files"


def _rows(files: Sequence[str], columns: Columns) -> Iterator[_Row]:
    number = 0
    for file in files:
        at, seen = 0, stamp(os.stat(file))
        for batch in _arrow_file(file).select(columns.names).to_batches(max_chunksize=1024):
            texts = batch.column(1) if columns.caption else [None] * batch.num_rows
            for picture, text in zip(batch.column(0), texts, strict=True):
                yield _Row(f"row {number:08d}", file, at, seen, picture, text)
                number, at = number + 1, at + 1


def _paired(rows: Iterator[_Row], known: Sequence[Record]) -> Iterator[tuple[_Row, Record | None]]:
    rows, same = tee(rows)
    return zip(rows, remembered((row.id for row in same), known), strict=True)


def _examined(
    task: tuple[_Row, Record | None], column: str, caption: str | None, allowed: Sequence[Path]
) -> Record | Rejected:
    """A row as a record, unless it cannot be used."""
    row, known = task
    location = ROW + json.dumps([row.file, column, row.at])
    try:
        texts = _captions(row.texts, caption)
        content, path = _parts(row.picture)
        if content is None:
            location = ""
            location = FILE + contained(path, allowed)
            facts = examine(location.removeprefix(FILE), known)
        elif known and (known.location, known.file_bytes, known.modified) == (location, *row.stamp):
            facts = Facts(*row.stamp, known.sha256, known.width, known.height)
        else:
            sha256, width, height = measured(content.as_py())
            facts = Facts(*row.stamp, sha256, width, height)
        return Record(row.id, location, texts, **facts._asdict())
    except Exception as error:  # a damaged picture can raise nearly anything in a decoder
        return Rejected(row.id, reason(error), location)


def _captions(texts: pa.Scalar | None, default: str | None) -> tuple[str, ...]:
    """A row's captions. Raises ValueError saying why they cannot be used."""
    try:
        return captions(None if texts is None else texts.as_py(), default)
    except UnicodeDecodeError:
        raise ValueError("has a caption that is not UTF-8: mend it") from None


def measured(content: bytes) -> tuple[str, int, int]:
    """The sha256, upright width and height of a picture that is decoded to the last pixel. Raises
    what Pillow raises, and ValueError for one that is empty or too big."""
    if not 0 < len(content) <= MAX_FILE_BYTES:
        raise ValueError(wrong_size(len(content)))
    return hashlib.sha256(content).hexdigest(), *decoded_size(content)


# Reading -------------------------------------------------------------------------------------


def read_row(where: str) -> bytes:
    """The picture's bytes from a record's location, without its `row:`, in any process. Raises
    UserError where the row is not there any more."""
    import pyarrow as pa

    try:
        file, column, at = json.loads(where)
        content, _ = _parts(_kept_open(file)[column][at])
        if content is None:
            raise ValueError("it holds no picture any more")
        return content.as_py()
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read the row {where}: {error}; the dataset has changed or was removed: "
            "run the command again, which reads it anew"
        ) from error


def _arrow_file(file: str) -> pa.Table:
    """What the library wrote, by memory map."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(file)).read_all()


_kept_open = lru_cache(maxsize=OPEN_FILES)(_arrow_file)


def _parts(picture: pa.Scalar) -> tuple[pa.Scalar | None, str | None]:
    """The bytes, not copied yet, and the path, of which a row may hold either."""
    import pyarrow as pa

    if not isinstance(picture, pa.StructScalar):
        return (picture if picture.is_valid else None), None
    if not picture.is_valid:
        return None, None
    content = picture["bytes"]
    path = picture["path"].as_py() if "path" in picture else None
    return (content if content.is_valid else None), path


def contained(path: str | None, allowed: Sequence[Path]) -> str:
    """The absolute path of a file that a row names. Raises ValueError unless it is a regular file
    in one of the folders `allowed`; relative ones are below the first."""
    if not path:
        raise ValueError("has no picture")
    if "://" in path:
        raise ValueError(f"names {shown(path)}, which is not on this machine: put the file there")
    place = allowed[0] / path
    try:
        inside = any(place.resolve(strict=True).is_relative_to(folder) for folder in allowed)
        if inside and not stat.S_ISREG(place.stat().st_mode):
            raise ValueError(f"names {shown(path)}, which is not a regular file")
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"names {shown(path)}, which cannot be reached: {why}") from None
    if not inside:
        raise ValueError(f"names {shown(path)}, which is outside the dataset's folder: copy it in")
    return str(place)
