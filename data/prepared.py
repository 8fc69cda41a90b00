"""Writes chosen pictures as ordinary folders: links or copies, and a metadata.jsonl for each.

What is written is listed in prepared.json before any of it is there. So the next run, or the same
one after it was broken off, knows which files are its own, and touches no others. What an earlier
run wrote is taken as it is only where it is what this run would write.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from data.examine import stamp
from data.files import Progress, silent, whole, write_atomically
from data.images import EXTENSIONS, FORMATS
from data.records import Record
from train.config import UserError

LIST, METADATA, LOCK = "prepared.json", "metadata.jsonl", ".lock"
COMPANIONS = {"mask": "masks", "depth": "depth"}
_UNFINISHED, _ALWAYS = "?", "!"  # for a sha256: may or may not be there; written every time


@dataclass(frozen=True)
class _File:
    """A file to be: its place below the output, the hash of its bytes and where they are from."""

    name: str
    sha256: str
    origin: Path | None
    read: Callable[[], bytes]
    record: Record | None = None
    """Of a picture: what knows its file without reading it again."""


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """While this lasts no other run writes there. Raises UserError where one does."""
    import fcntl

    with open(output / LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output={output} is being written by another run: let it end, or choose another "
                "output"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


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
    anything is changed, where a file that no run has written is in the way, and for a source file
    that is no longer what its record says.
    """
    names = {name: _Names(name, records) for name, records in sets.items()}
    old = _read_list(output)
    wanted = {file.name: file.sha256 for file in _files(names)}
    count = len(wanted)
    wanted |= {f"{name}/{METADATA}": _ALWAYS for name in names}
    _refuse_to_overwrite(output, wanted, old)
    try:
        # Until all is done, the list names what was there and what will be.
        changing = [name for name, sha256 in wanted.items() if old.get(name) != sha256]
        _write_list(output, {**old, **dict.fromkeys(changing, _UNFINISHED)})
        gone = old.keys() - wanted.keys()
        first = _in_the_way(wanted.keys(), gone)
        _remove(output, first)
        for done, file in enumerate(_files(names), start=1):
            _put(output / file.name, file, how, known=old.get(file.name) == file.sha256)
            progress(done, count)
        for each in names.values():
            each.write_metadata(output)
        _remove(output, gone - set(first))
        _write_list(output, wanted)
    except OSError as error:
        raise UserError(
            f"output={output} cannot be written ({error.strerror or error}): free some space there "
            "or choose another folder; the same command then goes on"
        ) from error


def published(output: Path) -> int:
    """How many files of earlier runs the list names."""
    return len(_read_list(output))


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
            name = f"{self.set_name}/{self.picture(record)}"
            yield _File(name, record.sha256, record.path, record.read, record)
            for kind in COMPANIONS:
                beside = self.companion(record, kind)
                if beside is not None:
                    path, sha256 = Path(getattr(record, kind)), getattr(record, f"{kind}_sha256")
                    yield _File(f"{self.set_name}/{beside}", sha256 or "", path, path.read_bytes)

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
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        for name, sha256 in content.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not isinstance(sha256, str):
                raise ValueError(f"{name[:200]!r} was not written by this command")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{output / LIST}, the list of what was written before, cannot be read ({error}): "
            "choose another output"
        ) from None
    return content


def _write_list(output: Path, files: Mapping[str, str]) -> None:
    write_atomically(output / LIST, json.dumps(files, indent=0, sort_keys=True).encode("ascii"))


def _refuse_to_overwrite(output: Path, wanted: Mapping[str, str], old: Mapping[str, str]) -> None:
    foreign = {
        found for name in wanted.keys() - old.keys() if (found := _foreign(output, name, old))
    }
    if foreign:
        raise UserError(
            f"output={output} holds {min(foreign)}, which this command did not put there "
            f"({len(foreign)} such): choose another output, or move it away"
        )


def _foreign(output: Path, name: str, old: Mapping[str, str]) -> str | None:
    """What stands where `name` is to be, or one of its folders, and is not in the list."""
    for folder in PurePosixPath(name).parents:
        path = output / folder
        if str(folder) not in old and os.path.lexists(path) and not path.is_dir():
            return str(folder)
    path = output / name
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_dir():
        return name
    # A folder that holds nothing but files of ours goes with them.
    inside = (
        child.relative_to(output).as_posix() for child in path.rglob("*") if _no_folder(child)
    )
    return next((child for child in inside if child not in old), None)


def _no_folder(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _in_the_way(wanted: Iterable[str], gone: Iterable[str]) -> list[str]:
    """Of the files that go, those where a folder is to be, or in a folder where a file is to be."""
    files = {PurePosixPath(name) for name in wanted}
    folders = {parent for path in files for parent in path.parents}
    return [
        name
        for name in gone
        if (path := PurePosixPath(name)) in folders or not files.isdisjoint(path.parents)
    ]


# Files ---------------------------------------------------------------------------------------


def _put(target: Path, file: _File, how: str, *, known: bool) -> None:
    """Makes the target what it is to be; `known`: the list says that a run has put it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if how == "link" and file.origin is not None:
        linked = _is_link(target, file.origin)
        if not (known and linked and file.record is None):  # that would read it all every time
            _demand_unchanged(file)
        if linked or _link(file.origin, target):
            return
    if known and _is_copy(target, file):
        return
    write_atomically(target, _content(file))
    if file.origin is not None:
        with suppress(OSError):
            shutil.copystat(file.origin, target)


def _is_link(target: Path, origin: Path) -> bool:
    """Whether the target is this very file; a symbolic link to it is not."""
    try:
        return not target.is_symlink() and os.path.samefile(origin, target)
    except OSError:
        return False


def _is_copy(target: Path, file: _File) -> bool:
    """Whether the target is a file of its own with these bytes. Where size and time are those of
    the origin, as a copy's are, the bytes are not read."""
    try:
        there = target.lstat()
        if not stat.S_ISREG(there.st_mode):
            return False
        if file.origin is not None:
            origin = file.origin.stat()
            if os.path.samestat(origin, there) or origin.st_size != there.st_size:
                return False
            if origin.st_mtime_ns == there.st_mtime_ns:
                return True
        return hashlib.sha256(target.read_bytes()).hexdigest() == file.sha256
    except OSError:
        return False


def _demand_unchanged(file: _File) -> None:
    """Reads a picture only where its file is not as the scan left it."""
    assert file.origin is not None
    record = file.record
    with suppress(OSError):  # gone, as the reading will say
        if record and stamp(file.origin.stat()) == (record.file_bytes, record.modified):
            return
    _content(file)


def _content(file: _File) -> bytes:
    try:
        content = file.read()
    except (OSError, UserError) as error:
        raise _changed(file) from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise _changed(file)
    return content


def _changed(file: _File) -> UserError:
    what = file.origin or file.name
    return UserError(f"{what} was changed while it was being prepared: run this again")


def _link(origin: Path, target: Path) -> bool:
    temporary = target.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(os.path.realpath(origin), temporary)  # never the symbolic link itself
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
        with suppress(NotADirectoryError, IsADirectoryError):  # another kind stands there since
            path.unlink(missing_ok=True)
        for folder in path.relative_to(output).parents:
            with suppress(OSError):  # not empty
                if folder != Path("."):
                    (output / folder).rmdir()
