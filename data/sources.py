"""A folder of captioned pictures, checked down to the last pixel before anything is trained."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from data import images
from data.cache import Progress, silent, write_atomically
from data.captions import read_captions
from data.listing import Listing, few, first, list_folder, shown
from train.config import UserError

INDEX_VERSION = 1  # to be raised whenever a picture accepted before could be refused now
MAX_FILE_BYTES = 1 << 30
READERS = min(8, os.cpu_count() or 1)

Facts = list[Any]  # [size in bytes, mtime_ns, sha256, width, height], as JSON has it


@dataclass(frozen=True)
class Record:
    """One picture and its caption."""

    id: str  # the path below the folder, with "/" and in Unicode NFC
    path: Path
    caption: str
    width: int  # pixels, upright
    height: int
    sha256: str  # of the file's bytes


@dataclass(frozen=True)
class Source:
    """What a folder holds: `recognised` says as what it was read and why, `notes` what was odd."""

    records: list[Record]
    recognised: str
    notes: list[str]


def scan(
    folder: Path,
    *,
    index: Path | None = None,
    caption: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
    progress: Progress = silent,
) -> Source:
    """Finds, pairs, reads and fully decodes the pictures in `folder` and below, sorted by id.

    Captions come from a metadata.jsonl in `folder` (lines with `file_name` and `text`) if there is
    one, else from a .txt or .caption file beside each picture; `caption` is given to the pictures
    that have none. With `index`, a JSON file, a picture whose size and modification time are known
    from the last scan is not read again. `progress(done, total)` counts pictures.

    Raises UserError naming everything that is wrong, the first 20 by name. With on_bad="skip" what
    is wrong is left out and named in the notes instead, as long as something is left.
    """
    listing = list_folder(Path(folder))
    captions, recognised = read_captions(listing, caption)
    facts = _examine(listing, captions, index, progress)
    if listing.problems and on_bad == "error":
        raise UserError(_complaint(listing))
    if not facts:
        raise UserError(f"data.path={folder}: no picture is left that can be used")
    if listing.problems:
        listing.notes.append(few("left out", _problem_lines(listing)))
    records = [_record(name, listing.files[name], captions[name], facts[name]) for name in facts]
    return Source(records, recognised, listing.notes)


def _record(name: str, path: Path, caption: str, facts: Facts) -> Record:
    _, _, sha256, width, height = facts
    return Record(name, path, caption, width, height, sha256)


def _complaint(listing: Listing) -> str:
    lines = _problem_lines(listing)
    return (
        f"data.path={listing.folder}: mend or remove what cannot be used ({len(lines)}):\n  "
        + "\n  ".join(first(lines))
    )


def _problem_lines(listing: Listing) -> list[str]:
    return [f"{shown(name)}: {why}" for name, why in sorted(listing.problems.items())]


def _examine(
    listing: Listing, names: Iterable[str], index: Path | None, progress: Progress
) -> dict[str, Facts]:
    """The facts of each good picture by id, sorted, read or remembered; problems for the others."""
    known = _load_index(index)
    facts: dict[str, Facts] = {}
    wanted = sorted(name for name in names if name not in listing.problems)
    with ThreadPoolExecutor(READERS) as pool:
        results = pool.map(lambda name: _facts(listing.files[name], known.get(name)), wanted)
        for done, (name, result) in enumerate(zip(wanted, results, strict=True), start=1):
            if isinstance(result, str):
                listing.problems[name] = result
            else:
                facts[name] = result
            progress(done, len(wanted))
    if index is not None and facts != known:
        _save_index(index, facts)
    return facts


def _facts(path: Path, known: Facts | None) -> Facts | str:
    """What is to be known of one picture, or why it cannot be used."""
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if known is not None and known[:2] == stamp:
            return known
        if not 0 < status.st_size <= MAX_FILE_BYTES:
            return f"has {status.st_size} bytes (at most {MAX_FILE_BYTES} are read)"
        content = path.read_bytes()
        size = images.upright_size(images.decode(io.BytesIO(content)))
        return [*stamp, hashlib.sha256(content).hexdigest(), *size]
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return "claims more pixels than any real picture has"
    return f"cannot be decoded: {error or type(error).__name__}"


def _load_index(index: Path | None) -> dict[str, Facts]:
    try:
        content = json.loads(index.read_bytes()) if index is not None else None
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != INDEX_VERSION:
        return {}
    files = content.get("files")
    entries = files.items() if isinstance(files, dict) else ()
    return {name: facts for name, facts in entries if isinstance(facts, list) and len(facts) == 5}


def _save_index(index: Path, facts: Mapping[str, Facts]) -> None:
    content = json.dumps({"version": INDEX_VERSION, "files": facts})
    try:
        write_atomically(index, content.encode("ascii"))
    except OSError as error:
        raise UserError(f"cannot write the index {index}: {error.strerror or error}") from error
