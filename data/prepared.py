"""Writes chosen pictures as ordinary folders: links or copies, and a metadata.jsonl for each.

What is written is listed in prepared.json before any of it is there. So the next run, or the same
one after it was broken off, knows which files are its own, and touches no others.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from data.files import Progress, silent, whole, write_atomically
from data.images import EXTENSIONS, FORMATS
from data.records import Record
from train.config import UserError

LIST, METADATA = "prepared.json", "metadata.jsonl"
COMPANIONS = {"mask": "masks", "depth": "depth"}
_UNFINISHED, _ALWAYS = "?", "!"  # for a sha256: may or may not be there; written every time


@dataclass(frozen=True)
class _File:
    """A file to be: its place below the output, the hash of its bytes and where they are from."""

    name: str
    sha256: str
    origin: Path | None
    read: Callable[[], bytes]


def publish(
    output: Path,
    sets: Mapping[str, Sequence[Record]],
    *,
    how: Literal["link", "copy"],
    progress: Progress = silent,
) -> None:
    """Makes OUTPUT/NAME hold exactly the pictures of each set, and its metadata.jsonl.

    A picture keeps its path below the source; masks and depth maps go to folders of their own. With
    `how` "link" they are hard links, or copies where the file system has no such links. Files that
    an earlier run wrote and that are no longer wanted are removed. Raises UserError, before
    anything is changed, where a file that no run has written is in the way.
    """
    names = {name: _Names(name, records) for name, records in sets.items()}
    old = _read_list(output)
    wanted = {file.name: file.sha256 for file in _files(names)}
    count = len(wanted)
    wanted |= {f"{name}/{METADATA}": _ALWAYS for name in names}
    _refuse_to_overwrite(output, wanted, old)
    try:
        # Until all is done, the list names what was there and what will be.
        _write_list(output, {**dict.fromkeys(wanted, _UNFINISHED), **old})
        for done, file in enumerate(_files(names), start=1):
            if old.get(file.name) != file.sha256 or not (output / file.name).is_file():
                _put(output / file.name, file, how)
            progress(done, count)
        for each in names.values():
            each.write_metadata(output)
        _remove(output, old.keys() - wanted.keys())
        _write_list(output, wanted)
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written ({error.strerror or error}): free some space there "
            "or choose another folder; the same command then goes on"
        ) from error


class _Names:
    """What the files of one set are called."""

    def __init__(self, set_name: str, records: Sequence[Record]) -> None:
        self.set_name, self.records = set_name, records
        self._extensions: dict[str, str] = {}
        firsts = {record.id.split("/")[0] for record in records}
        # A folder of pictures may be called "masks", too.
        self.folders = {kind: _unused(name, firsts) for kind, name in COMPANIONS.items()}

    def picture(self, record: Record) -> str:
        if PurePosixPath(record.id).suffix.lower() in EXTENSIONS:
            return record.id
        if record.id not in self._extensions:  # a row of a dataset
            self._extensions[record.id] = _extension(record.read())
        return record.id + self._extensions[record.id]

    def companion(self, record: Record, kind: str) -> str | None:
        path = getattr(record, kind)
        return path and f"{self.folders[kind]}/{record.id}{Path(path).suffix.lower()}"

    def files(self) -> Iterator[_File]:
        for record in self.records:
            yield self._file(self.picture(record), record.sha256, record.path, record.read)
            for kind in COMPANIONS:
                name = self.companion(record, kind)
                if name is not None:
                    path = Path(getattr(record, kind))
                    yield self._file(
                        name, getattr(record, f"{kind}_sha256") or "", path, path.read_bytes
                    )

    def _file(
        self, name: str, sha256: str, origin: Path | None, read: Callable[[], bytes]
    ) -> _File:
        return _File(f"{self.set_name}/{name}", sha256, origin, read)

    def write_metadata(self, output: Path) -> None:
        with whole(output / self.set_name / METADATA) as file:
            for record in self.records:
                line = json.dumps(self._line(record), ensure_ascii=False)
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def _line(self, record: Record) -> dict[str, object]:
        several = len(record.captions) > 1
        line: dict[str, object] = {
            "file_name": self.picture(record),
            "text": list(record.captions) if several else record.captions[0],
        }
        if record.focus is not None:
            line["focus"] = list(record.focus)
        companions = {kind: self.companion(record, kind) for kind in COMPANIONS}
        return line | {kind: name for kind, name in companions.items() if name is not None}


def _files(names: Mapping[str, _Names]) -> Iterator[_File]:
    for each in names.values():
        yield from each.files()


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "-"
    return name


def _extension(content: bytes) -> str:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        kind = image.format or ""
    return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")


# The list of what is ours --------------------------------------------------------------------


def _read_list(output: Path) -> dict[str, str]:
    try:
        content = json.loads((output / LIST).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{output / LIST}, the list of what was written before, cannot be read ({error}): "
            "choose another output"
        ) from None
    return content if isinstance(content, dict) else {}


def _write_list(output: Path, files: Mapping[str, str]) -> None:
    write_atomically(output / LIST, json.dumps(files, indent=0, sort_keys=True).encode("ascii"))


def _refuse_to_overwrite(output: Path, wanted: Mapping[str, str], old: Mapping[str, str]) -> None:
    foreign = {name for name in wanted.keys() - old.keys() if os.path.lexists(output / name)}
    if foreign:
        raise UserError(
            f"output={output} holds {min(foreign)}, which this command did not put there "
            f"({len(foreign)} such): choose another output, or move it away"
        )


# Files ---------------------------------------------------------------------------------------


def _put(target: Path, file: _File, how: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "link" and file.origin is not None and _link(file.origin, target):
        return
    write_atomically(target, file.read())
    if file.origin is not None:
        with suppress(OSError):
            shutil.copystat(file.origin, target)


def _link(origin: Path, target: Path) -> bool:
    temporary = target.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(origin, temporary)
        os.replace(temporary, target)
    except OSError:
        return False  # another file system, or one without links
    finally:
        temporary.unlink(missing_ok=True)  # a rename onto the same file leaves it
    return True


def _remove(output: Path, names: Iterable[str]) -> None:
    for name in names:
        path = output / name
        assert output in path.parents and ".." not in path.parts
        path.unlink(missing_ok=True)
        for folder in path.relative_to(output).parents:
            with suppress(OSError):  # not empty
                if folder != Path("."):
                    (output / folder).rmdir()
