"""The figures of `adapter_report` and `adapter_editing` as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from train import adapter_editing
from train.adapter_report import Row, block_of
from train.safetensors_file import shown

Columns = Mapping[str, Callable[[Any], str]]
_SHOWN = 100  # characters of a metadata's value


def inspected(found: Mapping[str, Any]) -> str:
    """`inspect`'s figures as text."""
    lines = [*_summary(found), "", *_block_table(found["blocks"])]
    if found["dora"] and "relative_norm" not in found:
        lines += ["", "DoRA: norms are of its factors' product; base= gives those of the change"]
    if found["not_finite"]:
        names = ", ".join(shown(name) for name in found["not_finite"][:3])
        lines += ["", f"NOT FINITE: {len(found['not_finite'])} layers, like {names}"]
    lines += ["", "metadata"] if found["metadata"] else []
    for key, value in found["metadata"].items():
        text = " ".join(value.split())
        more = "..." if len(text) > _SHOWN else ""
        lines.append(f"  {shown(key)}  {shown(text[:_SHOWN])}{more}")
    return "\n".join(lines)


def _summary(found: Mapping[str, Any]) -> list[str]:
    family = found["family"] or "not told by its layers"
    said_of = [found[key] for key in ("version", "prediction_type") if found[key]]
    base = [family, *(shown(str(text)) for text in said_of)]
    said = {None: "", True: " (as its metadata says)", False: " (its metadata says another)"}
    norm = f"{found['norm']:.4g}"
    if "relative_norm" in found:
        norm += f", {_number(found['relative_norm'], '.3g')} of the base's"
    size = f"{found['bytes'] / 2**20:.2f} MiB"
    rows = {
        "file": f"{_path(found['file'])} ({size}, format: {found['format']})",
        "base": ", ".join(base),
        "layers": f"{found['count']}: {_listed(found['targets'])}",
        "rank": _listed(found["ranks"]),
        "alpha": _listed(found["alphas"]),
        "numbers": f"{found['parameters']:,} in {', '.join(map(shown, found['dtypes']))}",
        "norm": norm,
        "sha256": found["hashes"]["sha256"],
        "tensors": f"{found['hashes']['sshs_model_hash']}{said[found['hashes']['as_said']]}",
    }
    return [f"{key:8}  {value}" for key, value in rows.items()]


def _listed(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


def _block_table(blocks: Sequence[Row]) -> list[str]:
    columns: dict[str, Callable[[Row], str]] = {
        "block": lambda row: shown(row["block"]),
        "layers": lambda row: str(row["count"]),
        "rank": lambda row: _range(row["ranks"]),
        "effective rank": lambda row: _number(row["effective_rank"], ".1f"),
        "norm": lambda row: f"{row['norm']:.4g}",
    }
    if blocks and "relative_norm" in blocks[0]:
        columns["of base's"] = lambda row: _number(row["relative_norm"], ".3g")
    return table(columns, blocks)


def compared(found: Mapping[str, Any]) -> str:
    """`compare`'s figures as text."""
    columns: dict[str, Callable[[Row], str]] = {
        "block": lambda row: shown(row["block"]),
        "layers": lambda row: str(row["count"]),
        "in both": lambda row: str(row["common"]),
        "norm of first": lambda row: f"{row['norms'][0]:.4g}",
        "of second": lambda row: f"{row['norms'][1]:.4g}",
        "cosine": lambda row: _number(row["cosine"], ".4f"),
        "distance": lambda row: _number(row["distance"], ".3g"),
    }
    rows = [*found["blocks"], {"block": "all", **found}]
    only = [
        f"only {_path(file)} changes {len(names)} layers, like {shown(names[0])}"
        for file, names in zip(
            found["files"], (found["only_first"], found["only_second"]), strict=True
        )
        if names
    ]
    return "\n".join(
        [*table(columns, rows), "distance: of the changes, over the first's norm", *only]
    )


def _path(text: str) -> str:
    """A path that may have been downloaded: whole, and without what moves a terminal's cursor."""
    return text if text.isprintable() else ascii(text)


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def edited(rows: Sequence[adapter_editing.Row]) -> str:
    """By block, how far what was written is from what was meant."""
    blocks: dict[str, list[adapter_editing.Row]] = {}
    for row in rows:
        blocks.setdefault(block_of(row.layer), []).append(row)
    columns: dict[str, Callable[[tuple[str, list[adapter_editing.Row]]], str]] = {
        "block": lambda one: shown(one[0]),
        "layers": lambda one: str(len(one[1])),
        "rank before": lambda one: _range(row.rank_before for row in one[1]),
        "rank": lambda one: _range(row.rank for row in one[1]),
        "norm": lambda one: f"{adapter_editing.total(one[1], lambda row: row.norm):.4g}",
        "error": lambda one: f"{adapter_editing.relative_error(one[1]):.3g}",
    }
    return "\n".join(table(columns, [*blocks.items(), ("all", list(rows))]))


def _range(ranks: Iterable[int]) -> str:
    found = sorted(set(ranks))
    return "-".join(map(str, dict.fromkeys((found[0], found[-1]))))


def table(columns: Columns, rows: Sequence[Any]) -> list[str]:
    """Lines of text in columns: the first to the left, numbers to the right."""
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
