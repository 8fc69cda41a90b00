"""Where an export lies: a folder, or a file with what belongs to it beside it; put there whole, and
in place of an earlier export alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from data.files import move_together
from train.config import UserError

MARK = ".sd-atelier-export"
"""In an exported folder: the names of what was written into it."""
_BESIDE = {"kohya": (".md", ".png"), "single_file": (".md", ".png", ".yaml")}
"""What lies beside a file, by its format: its card, its picture and, of a model, what it is."""


def pictures(file: Path) -> Path:
    """The folder of a card's pictures beside an exported file."""
    return file.with_name(f"{file.stem}-images")


def check(output: Path, format: str, *, overwrite: bool) -> None:
    """Raises UserError where something is in the way: anything at all, or with `overwrite` what is
    no earlier export."""
    is_file = format in _BESIDE
    there = [path for path in _all(output, format) if os.path.lexists(path)]
    if there and not overwrite:
        raise UserError(f"{there[0]} is there already: choose another output=, or overwrite=true")
    if output.exists() and output.is_dir() == is_file:
        raise UserError(f"output={output} is a {'folder' if is_file else 'file'}: choose another")
    if mine := [p for p in there if p.suffix == ".yaml" and not _is_of_a_model(p)]:
        raise UserError(f"{mine[0]} is not of an export: choose another output=, or move it away")
    for folder in (path for path in there if path.is_dir()):
        if others := _not_ours(folder):
            raise UserError(
                f"{folder} holds {others[0]}, which no export has written: choose another output=, "
                "or move it away yourself"
            )


@contextmanager
def place(output: Path, format: str, *, overwrite: bool) -> Iterator[Path]:
    """A place to write to, which with all that is written beside it is at `output` once everything
    is on the disk, and gone if anything fails; what was there is then there again."""
    from train.checkpoint_files import sync

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=output.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        old.mkdir()
        temporary = new / output.name
        yield temporary
        for folder in (path for path in new.iterdir() if path.is_dir()):
            _mark(folder)
        for path in new.rglob("*"):
            sync(path)
        check(output, format, overwrite=overwrite)
        _swap(new, old, _all(output, format))
        sync(output.parent)


def files(output: Path, format: str) -> dict[str, Path]:
    """What belongs to an export, by its names in a repository."""
    if output.is_dir():
        return {str(path.relative_to(output)): path for path in _files_in(output)}
    named = {path.name: path for path in _all(output, format) if path.is_file()}
    shown = {f"{pictures(output).name}/{path.name}": path for path in _files_in(pictures(output))}
    card = named.pop(output.with_suffix(".md").name, None)
    return {**named, **shown, **({"README.md": card} if card else {})}


def _all(output: Path, format: str) -> list[Path]:
    if format not in _BESIDE:
        return [output]
    return [output, *map(output.with_suffix, _BESIDE[format]), pictures(output)]


def _is_of_a_model(path: Path) -> bool:
    """Whether it describes a model, as single_file writes it, and is not a run's configuration."""
    try:
        content: Any = yaml.safe_load(path.read_bytes())
        return "params" in content["model"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return False


def _mark(folder: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / MARK).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _not_ours(folder: Path) -> list[str]:
    """What is in a folder beside what an export wrote there; of no export, all."""
    mark = folder / MARK
    known = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    there = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {str(path.relative_to(folder)) for path in there} - {MARK}
    return sorted(names - set(known)) or ([] if mark.is_file() else ["no list of what it is"])


def _files_in(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    return sorted(found)


def _swap(new: Path, old: Path, stale: list[Path]) -> None:
    """What is in `new` in place of `stale`, which goes to `old`; back, if that fails."""
    aside = [(path, old / path.name) for path in stale if os.path.lexists(path)]
    target = stale[0].parent
    move_together([*aside, *((path, target / path.name) for path in new.iterdir())])
