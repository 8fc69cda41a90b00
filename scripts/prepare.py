"""Makes a clean training set, and a report on it, from any folder of pictures.

    python scripts/prepare.py source=my/pictures output=prepared held_out=0.1 smallest=512

OUTPUT/train and OUTPUT/held-out are ordinary folders for data.path and evaluation.path. Look at
OUTPUT/report.html first; report.json and pictures.jsonl say the same to a program. The source stays
as it is. The same command again goes on where it was broken off, and otherwise changes nothing.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data import duplicates, selection, splitting
from data.buckets import too_small
from data.checks import caption_statistics, token_counter, warnings
from data.duplicates import Match, Prints, matches_between
from data.files import progress, whole, write_atomically
from data.fingerprints import Fingerprints, fingerprints
from data.listing import NAMED_AT_MOST, shown
from data.prepared import LOCK, alone, publish, published
from data.records import Table
from data.selection import Selection
from data.sources import Source, quarantine, scan
from eval import dataset_account as account
from eval.dataset_report import verdict, write_dataset_report
from scripts.prepare_config import PrepareConfig
from train import screens
from train.config import UserError, command, load

INDEX = "index.arrow"


def main(arguments: list[str]) -> None:
    config = load(PrepareConfig, arguments)
    refuse_overlap(config)
    make_folder(config.output)
    with alone(config.output):
        prepare(config)


def prepare(config: PrepareConfig) -> None:
    source = read_source(config)
    table, chosen = source.table, Selection(len(source.table))
    looked = fingerprints(table, config.output, config.background, progress("looked at"))

    by_measure(chosen, table, config)
    groups, matches = by_likeness(chosen, table, looked.prints(), config)
    leaks = by_leak(chosen, table, looked, config)
    scores = by_scores(chosen, table, config)
    held_out = split(chosen, table, groups, config)

    training = np.array([k for k in chosen.left if not held_out[k]], np.int64)
    report = {
        "version": account.VERSION,
        "settings": config.model_dump(mode="json"),
        "recognised": source.recognised,
        "notes": source.notes,
        "counts": account.counts(source, chosen, held_out),
        "rejected": account.rejected(source),
        "removed": account.removed(chosen, table),
        "duplicates": account.duplicates(table, matches, removed=config.duplicates == "remove"),
        "against": leaks,
        "oddities": account.oddities(looked, table),
        "scores": account.scores_account(scores, limits(config)),
        **account.geometry(table, training, config, batch_size=config.batch_size),
        "captions": captions(chosen, table, config),
        "left_from_before": published(config.output) if config.files == "none" else 0,
    }
    report["warnings"] = warnings(report)
    write(report, chosen, table, held_out, scores, config)
    tell(report, config)


# Reading -------------------------------------------------------------------------------------


def refuse_overlap(config: PrepareConfig) -> None:
    """Nothing of the source is touched, and nothing written is taken for a source."""
    try:
        output = config.output.resolve()
        str(output).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"output={shown(str(config.output))} is not UTF-8: choose another folder"
        ) from None
    for key, text in (("source", config.source), ("against", config.against)):
        path = Path(text or "").resolve()
        if text is None or text.startswith("hf:"):
            continue
        if key == "source" and not path.exists():
            raise UserError(f"source={text} does not exist: give the folder of pictures")
        if path == output or output in path.parents or path in output.parents:
            raise UserError(f"{key}={text} and output={config.output} overlap: give another output")


def make_folder(folder: Path) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(n for n in there if not n.startswith((LOCK, INDEX)) and n != "lost+found")
    if foreign and INDEX not in there:
        raise UserError(f"output={folder} holds something else ({foreign[0]}): give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        (folder / LOCK).touch()
    except OSError as error:
        raise UserError(f"output={folder} cannot be written ({error.strerror or error})") from error


def read_source(config: PrepareConfig) -> Source:
    try:
        source = scan(
            config.source,
            index=config.output / INDEX,
            caption=config.caption,
            on_bad="abort" if config.on_bad_image == "abort" else "report",
            masks=config.masks,
            depth=config.depth,
            split=config.split,
            revision=config.revision,
            image_column=config.image_column,
            caption_column=config.caption_column,
            progress=progress("read"),
        )
    except UserError as error:
        raise UserError(_own_keys(str(error))) from None
    rejected = [replace(bad, reason=_own_keys(bad.reason)) for bad in source.rejected]
    notes = [note for note in source.notes if not note.startswith("left out")]
    source = replace(source, rejected=rejected, notes=notes)
    if config.on_bad_image == "quarantine":
        quarantine(source.rejected, config.output / "quarantine")
    return source


def _own_keys(text: str, key: str = "source") -> str:
    """What a message calls data.caption is caption here, and data.path is source."""
    text = re.sub(r"\bdata\.path=", f"{key}=", text)
    own = "caption|on_bad_image|split|revision|image_column|caption_column"
    return re.sub(rf"\bdata\.(?=({own})\b)", "", text)


# Choosing ------------------------------------------------------------------------------------


def by_measure(chosen: Selection, table: Table, config: PrepareConfig) -> None:
    selection.by_size(
        chosen,
        table.widths,
        table.heights,
        smallest=config.smallest,
        max_aspect=config.max_aspect,
    )
    if not config.upscale:
        for k in np.flatnonzero(too_small(table.widths, table.heights, config.bucket_step)):
            chosen.remove(k, "upscale", f"smaller than a bucket_step of {config.bucket_step}")


def by_likeness(
    chosen: Selection, table: Table, prints: Prints, config: PrepareConfig
) -> tuple[np.ndarray, list[Match]]:
    """The group of every picture (n,), left out or not, for the split; and the duplicates."""
    if config.duplicates == "off":
        _, groups = np.unique(np.array(table.column("sha256")), return_inverse=True)
        return groups, []
    distance = config.duplicate_distance
    groups = duplicates.groups(prints, distance=distance, progress=progress("compared"))
    matches = selection.find_duplicates(
        table, prints, groups, chosen.left, distance=distance, default=config.caption
    )
    if config.duplicates == "remove":
        for match in matches:
            kept, copy = table[match.kept], table[match.index]
            alike = selection.how_alike(match, exact=kept.sha256 == copy.sha256)
            chosen.remove(match.index, "duplicates", f"shows the same as {kept.id} ({alike})")
    return groups, matches


def by_leak(
    chosen: Selection, table: Table, looked: Fingerprints, config: PrepareConfig
) -> dict[str, Any] | None:
    """What is also in the held-out set that exists, and what of that could not be read."""
    if config.against is None:
        return None
    source = read_held_out(config.against)
    other = source.table
    seen = fingerprints(other, config.output, config.background, progress("looked at"))
    left, remove = chosen.left, config.duplicates == "remove"
    theirs = np.arange(len(other)) + len(table)
    matches = matches_between(looked.union(seen), left, theirs, distance=config.duplicate_distance)
    rows = []
    for match in matches:
        like = other[match.kept - len(table)].id
        rows.append({"id": table[match.index].id, "like": like, "mirrored": match.mirrored})
        if remove:
            chosen.remove(match.index, "against", f"shows the same as {like} in {config.against}")
    return {
        "path": config.against,
        "removed": remove,
        "matches": rows,
        "pictures": len(other),
        "rejected": account.rejected(source),
    }


def read_held_out(path: str) -> Source:
    try:
        source = scan(path, on_bad="report", caption="", progress=progress("read"))
    except UserError as error:
        text = str(error).replace(", or leave them out with data.on_bad_image=report", "")
        text = text if "data.path=" in text else f"against={text}"
        raise UserError(_own_keys(text, "against")) from None
    return replace(
        source,
        rejected=[replace(bad, reason=_own_keys(bad.reason, "against")) for bad in source.rejected],
    )


def by_scores(chosen: Selection, table: Table, config: PrepareConfig) -> dict[str, Any]:
    """Each score's values (n,), nan where a picture was left out before."""
    if not (config.aesthetic.head or config.clip.model or config.nsfw.model):
        return {}
    from eval.picture_scores import score_all

    left = chosen.left
    found = score_all(
        table.take(left),
        scorers(config),
        config.output,
        background=config.background,
        batch_size=config.score_batch_size,
        progress=progress("scored"),
    )
    scores = {}
    for name, values in found.items():
        limit = limits(config)[name]
        if limit is not None:
            selection.by_score(chosen, name, values, left, limit=limit, above=name != "nsfw")
        scores[name] = np.full(len(table), np.nan)
        scores[name][left] = values
    return scores


def limits(config: PrepareConfig) -> dict[str, float | None]:
    """The least or, of nsfw, the most that a picture may score."""
    return {
        "aesthetic": config.aesthetic.minimum,
        "clip": config.clip.minimum,
        "nsfw": config.nsfw.maximum,
    }


def scorers(config: PrepareConfig) -> list[Any]:
    import torch

    from eval.features import load_clip
    from eval.picture_scores import Aesthetic, CaptionLikeness, Nsfw

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    extractors = {
        path: load_clip(path, device=device)
        for path in {config.aesthetic.clip if config.aesthetic.head else None, config.clip.model}
        if path is not None
    }
    found: list[Any] = []
    if config.aesthetic.head:
        clip = extractors[config.aesthetic.clip]
        found.append(Aesthetic(clip, config.aesthetic.head, relu=config.aesthetic.relu))
    if config.clip.model:
        found.append(CaptionLikeness(extractors[config.clip.model]))
    if config.nsfw.model:
        found.append(Nsfw(config.nsfw.model, label=config.nsfw.label, device=device))
    return found


def split(chosen: Selection, table: Table, groups: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Which pictures of all (n,) are kept and held out."""
    if not config.held_out or not len(chosen.left):
        return np.zeros(len(table), bool)
    wanted, seed = config.held_out, config.seed
    before = splitting.read_sides(config.output, wanted=wanted, seed=seed)
    kept = np.zeros(len(table), bool)
    kept[chosen.left] = True
    held_out, sides = splitting.hold_out(
        table.column("sha256"), groups, kept, wanted=wanted, seed=seed, before=before
    )
    if config.files != "none":
        splitting.write_sides(config.output, {**before, **sides}, wanted=wanted, seed=seed)
    return held_out & kept


def captions(chosen: Selection, table: Table, config: PrepareConfig) -> dict[str, Any]:
    found = caption_statistics(
        table.take(chosen.left), token_counter(config.tokenizer), max_tokens=config.max_tokens
    )
    return found | {"exact": config.tokenizer is not None}


# Writing --------------------------------------------------------------------------------------


def write(
    report: dict[str, Any],
    chosen: Selection,
    table: Table,
    held_out: np.ndarray,
    scores: dict[str, np.ndarray],
    config: PrepareConfig,
) -> None:
    left = chosen.left
    if config.files != "none":
        sets = {"train": table.take(left[~held_out[left]])}
        if config.held_out:
            sets["held-out"] = table.take(left[held_out[left]])
        publish(config.output, sets, how=config.files, progress=progress("written"))
    with whole(config.output / "pictures.jsonl") as file:
        for row in account.picture_rows(chosen, table, held_out, scores, config):
            file.write(json.dumps(row).encode("ascii") + b"\n")
    content = json.dumps(report, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_atomically(config.output / "report.json", content)
    write_dataset_report(config.output / "report.html", report, table)


def tell(report: dict[str, Any], config: PrepareConfig) -> None:
    for bad in report["rejected"][:NAMED_AT_MOST]:
        print(f"cannot be used: {shown(bad['id'])}: {bad['reason']}")
    for note in report["notes"]:
        print(f"note: {note}")
    print(verdict(report))
    for warning in report["warnings"]:
        print(f"- {warning['text']}")
    print(f"report: {config.output / 'report.html'}")
    screens.done(config.output, counts=report["counts"])
    if not report["counts"]["train"]:
        raise UserError("no picture is left to train on; the report says why")


if __name__ == "__main__":
    command(main)
