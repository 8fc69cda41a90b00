"""A folder of captioned pictures, checked down to the last pixel before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data.captions import Layout, recognise
from data.companions import KINDS, Kind
from data.examine import Lock, examine, in_order, load, locked, remembered, store
from data.files import Progress, silent
from data.images import open_image
from data.listing import Listing, Tally, first, list_folder, shown
from data.quarantine import quarantine as quarantine
from data.records import FILE, Record, Table
from train.config import UserError

_NO_MASKS = ["masks are read for folders of pictures, not for datasets: all of each picture counts"]
SAME_ASPECT = 1.02  # most that a companion's aspect ratio may differ from its picture's


@dataclass(frozen=True)
class Rejected:
    """A picture, or a line of metadata, that cannot be used."""

    id: str  # as in Record, or FILE:LINE
    reason: str
    location: str = ""  # as in Record; "" where there is no regular file that could be opened


@dataclass(frozen=True)
class Source:
    """What a folder holds: `recognised` says as what it was read and why, `notes` what was odd."""

    table: Table
    recognised: str
    notes: list[str]
    rejected: list[Rejected] = field(default_factory=list)


def scan(
    path: str | Path,
    *,
    index: Path | None = None,
    caption: str | None = None,
    on_bad: Literal["abort", "report"] = "abort",
    masks: bool = False,
    depth: bool = False,
    split: str = "train",
    revision: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    progress: Progress = silent,
) -> Source:
    """Finds, pairs, reads and fully decodes the pictures in a folder and below, sorted by id.

    `path` may also be a Hugging Face dataset: hf:OWNER/NAME, or one on disk; `split`, `revision`
    and the columns are for those. Captions come from metadata.jsonl, .csv or .parquet, from texts/
    beside images/, or from a .txt or .caption file beside each picture; `caption` is given to the
    pictures that have none. With masks and depth, those beside the pictures are looked up, and a
    picture without a depth map cannot be used.

    index: Arrow file in which a picture is remembered, so that it is not read again as long
    as its file is the same by size, times and inode. Several processes may scan at the same time.
    `progress(done, total)` counts pictures.

    Raises UserError naming everything that is wrong, the first 20 by name. With on_bad="report"
    what is wrong is left out and in `rejected` instead, as long as something is left.
    """
    from data.hugging_face import is_dataset, scan_dataset

    if is_dataset(str(path)):
        if depth:
            raise UserError(f"{path}: depth maps are read for folders of pictures only")
        source = scan_dataset(
            str(path),
            index=index,
            caption=caption,
            on_bad=on_bad,
            split=split,
            revision=revision,
            image_column=image_column,
            caption_column=caption_column,
            progress=progress,
        )
        return replace(source, notes=source.notes + _NO_MASKS) if masks else source
    kinds = [kind for kind, wanted in zip(KINDS, (masks, depth), strict=True) if wanted]
    layout = recognise(list_folder(Path(path)), caption, caption_column)
    found = _Scan(layout, caption, kinds, progress)
    with locked(index) as lock:
        table = found.run(index, lock)
    return _checked(found, table, on_bad)


def _checked(found: _Scan, table: Table, on_bad: str) -> Source:
    """What was found, if it can be used as it is."""
    listing = found.layout.listing
    rejected = _rejected(listing)
    if rejected and (on_bad == "abort" or not len(table)):
        raise UserError(complaint(str(listing.folder), rejected))
    if not len(table):
        raise UserError(f"{listing.folder}: no picture is left that can be used")
    left_out = Tally(f"{shown(bad.id)}: {bad.reason}" for bad in rejected)
    notes = [*listing.notes, *found.notes(), *left_out.note("left out")]
    return Source(table, found.layout.recognised, notes, rejected)


def complaint(what: str, rejected: Sequence[Rejected]) -> str:
    """All that cannot be used in `what`, the first 20 by name, and the remedies."""
    lines = [f"{shown(bad.id)}: {bad.reason}" for bad in rejected]
    return (
        f"{what}: {len(lines)} cannot be used; mend or remove them, or leave them out with "
        "data.on_bad_image=report:\n  " + "\n  ".join(first(lines))
    )


def _rejected(listing: Listing) -> list[Rejected]:
    # Links, FIFOs and lines of metadata are not among the names: nobody shall open those.
    return [
        Rejected(name, why, FILE + listing.path(name) if name in listing else "")
        for name, why in sorted(listing.problems.items())
    ]


class _Scan:
    """The pictures of a layout made into rows: companions first, then the pictures themselves."""

    def __init__(
        self, layout: Layout, default: str | None, kinds: Sequence[Kind], progress: Progress
    ) -> None:
        self.layout, self._default, self._kinds = layout, default, kinds
        self._progress, self._done = progress, 0
        self._total = len(layout.pictures) * (1 + len(kinds))
        self._several, self._given, self._unmasked = Tally(), Tally(), Tally()

    def run(self, index: Path | None, lock: Lock) -> Table:
        """The table of all pictures that can be used; the listing's problems say of the others."""
        beside = [self._companions(kind, _beside(index, kind), lock) for kind in self._kinds]
        known, names = load(index), self._wanted()
        self._total = self._done + len(names)
        tasks = zip(names, *(remembered(names, rows) for rows in (known, *beside)), strict=True)
        rows = self._kept(in_order(self._picture, tasks))
        return store(index, map(self._tallied, rows), known, lock)

    def notes(self) -> list[str]:
        """What was odd about the pictures that can be used."""
        notes = self.layout.notes(self._several)
        if self._given.count < len(self.layout.pictures):
            notes += self._given.note("with data.caption as their caption")
        return notes + self._unmasked.note("without a mask, so that all of the picture counts")

    def _wanted(self) -> list[str]:
        problems = self.layout.listing.problems
        return [name for name in self.layout.pictures if name not in problems]

    def _kept(self, results: Iterable[Record | Rejected | None]) -> Iterator[Record]:
        for result in results:
            if isinstance(result, Rejected):
                self.layout.listing.problems[result.id] = result.reason
            elif result is not None:
                yield result
            self._done += 1
            self._progress(self._done, self._total)

    def _tallied(self, record: Record) -> Record:
        if len(record.captions) > 1:
            self._several.add(record.id)
        if record.captions == (self._default,):
            self._given.add(record.id)
        if "mask" in self._kinds and record.mask is None:
            self._unmasked.add(record.id)
        return record

    def _picture(self, task: tuple[Any, ...]) -> Record | Rejected:
        """The row of a picture, from (its id, its row in the index, a row for each companion)."""
        name, known, *found = task
        beside: dict[Kind, Record] = {
            kind: row for kind, row in zip(self._kinds, found, strict=True) if row is not None
        }
        try:
            if "depth" in self._kinds and "depth" not in beside:
                raise ValueError(
                    "has no depth map: make those that lack with scripts/depth.py "
                    f"source={self.layout.listing.folder}"
                )
            captions = self._captions(name)
            row = self._row(name, name, known)
            for kind, companion in beside.items():
                _demand_aspect(kind, companion, row)
            return replace(
                row, captions=captions, focus=self.layout.focus(name), **_companions(beside)
            )
        except ValueError as error:
            return Rejected(name, str(error))

    def _captions(self, name: str) -> tuple[str, ...]:
        captions = self.layout.captions(name)
        if captions or self._default is not None:
            return captions or (self._default or "",)
        raise ValueError("has no caption: write one, or set data.caption for all such")

    def _companions(self, kind: Kind, index: Path | None, lock: Lock) -> Table:
        """A row for each picture that has a companion of this kind: the companion's facts under
        the picture's id."""
        known, names = load(index), self._wanted()
        tasks = zip(names, remembered(names, known), strict=True)
        results = in_order(lambda task: self._companion(kind, *task), tasks)
        return store(index, self._kept(results), known, lock)

    def _companion(self, kind: Kind, name: str, known: Record | None) -> Record | Rejected | None:
        file = None
        try:
            file = self.layout.companion(name, kind)
            if file is None:
                return None
            row = self._row(name, file, known)
            if kind == "mask" and (known is None or known.sha256 != row.sha256):
                _demand_white(row)
            return row
        except ValueError as error:
            return Rejected(name, f"its {kind} {shown(file)} {error}" if file else str(error))

    def _row(self, name: str, file: str, known: Record | None) -> Record:
        path = self.layout.listing.path(file)
        return Record(name, FILE + path, (), **examine(path, known)._asdict())


def _beside(index: Path | None, kind: Kind) -> Path | None:
    return None if index is None else index.with_name(f"{index.stem}-{kind}{index.suffix}")


def _companions(beside: Mapping[Kind, Record]) -> dict[str, Any]:
    """The companions as fields of their picture's record."""
    fields: dict[str, Any] = {}
    for kind, row in beside.items():
        fields |= {kind: row.location.removeprefix(FILE), f"{kind}_sha256": row.sha256}
    return fields


def _demand_white(mask: Record) -> None:
    with open_image(Path(mask.location.removeprefix(FILE)), (0, 0, 0)) as image:
        if image.convert("L").getextrema() == (0, 0):
            raise ValueError("is black all over, so nothing of its picture would count")


def _demand_aspect(kind: Kind, companion: Record, picture: Record) -> None:
    ratio = companion.width * picture.height / (companion.height * picture.width)
    if max(ratio, 1 / ratio) > SAME_ASPECT:
        raise ValueError(
            f"is {picture.width}x{picture.height}, but its {kind} {companion.path} is "
            f"{companion.width}x{companion.height}, which has other proportions: make it anew"
        )
