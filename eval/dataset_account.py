"""What a preparation did, as report.json and pictures.jsonl say it: counts, buckets, captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data import selection
from data.buckets import Account, account, bucket_table, buckets_of
from data.checks import HEAVY_CROP, SPOKEN, STRONG_ENLARGEMENT, short_batches
from data.duplicates import Match
from data.fingerprints import ODDITIES, Fingerprints
from data.images import crop_centres, fit_geometry
from data.records import Record, Table
from data.selection import Selection
from data.sources import Source
from train.config import Cropping

VERSION = 1  # of report.json
SHOWN_CROPPED, SHOWN_PER_BUCKET, SHOWN = 18, 3, 60  # pictures on the contact sheet
NAMED = 100  # pictures named for each oddity in report.json


def counts(source: Source, chosen: Selection, held_out: np.ndarray) -> dict[str, Any]:
    left = len(chosen.left)
    return {
        "found": len(source.table) + len(source.rejected),
        "rejected": len(source.rejected),
        "removed": chosen.counts(),
        "kept": left,
        "train": left - int(held_out.sum()),
        "held_out": int(held_out.sum()),
    }


def rejected(source: Source) -> list[dict[str, str]]:
    """What cannot be used."""
    return [
        {"id": bad.id, "reason": bad.reason, "location": bad.location} for bad in source.rejected
    ]


def removed(chosen: Selection, table: Table) -> dict[str, list[dict[str, str]]]:
    """The pictures that each filter left out, with reasons."""
    rows: dict[str, list[dict[str, str]]] = {}
    for k in sorted(chosen.left_out):
        by, reason = chosen.left_out[k]
        rows.setdefault(by, []).append({"id": table[k].id, "reason": reason})
    return rows


def duplicates(table: Table, matches: Sequence[Match], *, removed: bool) -> dict[str, Any]:
    """The groups, and how many copies have another caption than the picture they double."""
    others = (table[match.index].captions != table[match.kept].captions for match in matches)
    return {
        "copies": len(matches),
        "mirrored": sum(match.mirrored for match in matches),
        "other_captions": sum(others),
        "groups": selection.describe(matches, table, removed),
    }


def oddities(looked: Fingerprints, table: Table) -> dict[str, dict[str, Any]]:
    """What was read with care: the pictures' number, and the first of them by name."""
    found = {}
    for name, meaning in ODDITIES.items():
        indices = np.flatnonzero(looked.odd(name))
        if len(indices):
            ids = [table[int(k)].id for k in indices[:NAMED]]
            found[name] = {"meaning": meaning, "pictures": len(indices), "ids": ids}
    return found


def geometry(
    table: Table, indices: np.ndarray, cropping: Cropping, *, batch_size: int
) -> dict[str, Any]:
    """The buckets of the pictures to train on, what they do to them, and some to be shown."""
    sizes, fits = plan(table, indices, cropping)
    rows = [
        {
            "width": row.size[0],
            "height": row.size[1],
            "images": row.images,
            "cropped": round(row.cropped, 4),
            "most_cropped": round(row.most_cropped, 4),
            "enlarged": row.enlarged,
        }
        for row in (bucket_table(sizes, fits) if len(indices) else [])
    ]
    short, batches = short_batches(rows, batch_size)
    return {
        "buckets": rows,
        "geometry": {
            "cropped": round(float(fits.cropped.mean()), 4) if len(indices) else 0.0,
            "heavily_cropped": int((fits.cropped > HEAVY_CROP).sum()),
            "enlarged": int(fits.enlarged.sum()),
            "strongly_enlarged": int((fits.scale > STRONG_ENLARGEMENT).sum()),
            "most_cropped": _most(fits.cropped, HEAVY_CROP, table, indices),
            "most_enlarged": _most(fits.scale, STRONG_ENLARGEMENT, table, indices),
            "batches": batches,
            "short_batches": short,
        },
        "contact_sheet": [
            crop_of(table[int(indices[k])], sizes[k], float(fits.cropped[k]), cropping)
            for k in worth_showing(sizes, fits)
        ],
    }


def _most(values: np.ndarray, limit: float, table: Table, indices: np.ndarray) -> list[str]:
    """The ids of the few pictures furthest above the limit."""
    worst = np.argsort(-values, kind="stable")[:SPOKEN]
    return [table[int(indices[k])].id for k in worst if values[k] > limit]


def plan(table: Table, indices: np.ndarray, cropping: Cropping) -> tuple[np.ndarray, Account]:
    """The bucket (m, 2) of each of these pictures, and what becomes of them."""
    widths, heights = table.widths[indices], table.heights[indices]
    sizes = np.empty((0, 2), np.int32)
    if len(indices):
        sizes = buckets_of(cropping, widths, heights)
    return sizes, account(widths, heights, sizes)


def worth_showing(sizes: np.ndarray, fits: Account) -> list[int]:
    """The worst cropped, then the first few of every bucket, the fullest buckets first."""
    order = np.argsort(-fits.cropped, kind="stable")[:SHOWN_CROPPED]
    shown = [int(k) for k in order if fits.cropped[k] > HEAVY_CROP / 5]
    buckets, members, count = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    for bucket in np.argsort(-count, kind="stable"):
        own = np.flatnonzero(members.reshape(-1) == bucket)
        spread = own[np.linspace(0, len(own) - 1, min(SHOWN_PER_BUCKET, len(own))).astype(int)]
        shown += [int(k) for k in spread if int(k) not in shown]
    return shown[:SHOWN]


def crop_of(record: Record, size: np.ndarray, cropped: float, cropping: Cropping) -> dict[str, Any]:
    """A picture, its bucket, and the boxes that are kept, in shares of its sides."""
    bucket = (int(size[0]), int(size[1]))
    centres = crop_centres(
        record.width,
        record.height,
        bucket,
        crop=cropping.crop,
        focus=record.focus,
        sha256=record.sha256,
        variants=cropping.crop_variants,
    )
    sides = np.array([record.width, record.height] * 2)
    boxes = [fit_geometry(record.width, record.height, bucket, centre).box for centre in centres]
    return {
        "id": record.id,
        "size": [record.width, record.height],
        "bucket": list(bucket),
        "cropped": round(cropped, 4),
        "boxes": [[round(float(side), 4) for side in np.array(box) / sides] for box in boxes],
        "caption": record.captions[0][:200],
    }


def scores_account(
    scores: Mapping[str, np.ndarray], limits: Mapping[str, float | None]
) -> dict[str, Any]:
    """Each score's histogram, median and limit."""
    found: dict[str, Any] = {}
    for name, values in scores.items():
        known = values[np.isfinite(values)]
        if len(known):
            numbers, edges = np.histogram(known, bins=30)
            found[name] = {
                "limit": limits[name],
                "edges": [round(float(edge), 6) for edge in edges],
                "pictures": numbers.tolist(),
                "median": round(float(np.median(known)), 6),
            }
    return found


def picture_rows(
    chosen: Selection,
    table: Table,
    held_out: np.ndarray,
    scores: Mapping[str, np.ndarray],
    cropping: Cropping,
) -> Iterator[dict[str, Any]]:
    """One line for every picture that could be read: where it went, or why it did not."""
    left = chosen.left
    sizes, fits = plan(table, left, cropping)
    place = np.full(len(table), -1)
    place[left] = np.arange(len(left))
    for k, record in enumerate(table):
        row: dict[str, Any] = {"id": record.id, "size": [record.width, record.height]}
        row |= {name: float(v[k]) for name, v in scores.items() if np.isfinite(v[k])}
        at = int(place[k])
        if at < 0:
            by, reason = chosen.left_out[k]
            yield row | {"left_out_by": by, "reason": reason}
            continue
        yield row | {
            "set": "held-out" if held_out[k] else "train",
            "bucket": sizes[at].tolist(),
            "scale": round(float(fits.scale[at]), 4),
            "cropped": round(float(fits.cropped[at]), 4),
            "enlarged": bool(fits.enlarged[at]),
        }
