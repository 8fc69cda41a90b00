"""The evaluation as one HTML file: no script, no network, readable on a phone, light and dark."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

_LONGEST_SIDE = 512  # pixels of an embedded picture: a phone's width at 3x, 100 pictures in 10 MB


@dataclass(frozen=True)
class Panel:
    """One picture of a comparison: a file or uint8 (H, W, 3), and what stands below it."""

    picture: Path | np.ndarray
    label: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Pictures that belong side by side, and the prompt they share."""

    prompt: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Section:
    """A heading, a sentence below it and comparisons."""

    title: str
    explanation: str
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class Table:
    """Rows of a name and cells; a cell is a value and a small print below it (say an interval)."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def write_report(
    path: Path,
    *,
    title: str,
    verdict: str,
    table: Table,
    warnings: Sequence[str],
    sections: Sequence[Section],
    method: Sequence[tuple[str, str]],
) -> None:
    """Write the report to `path`, whole or not at all; every text is escaped."""
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{escape(verdict)}</p>',
            _table(table),
            "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings),
            "".join(_section(section) for section in sections),
            _method(method),
        ]
    )
    page = _PAGE.replace("{title}", escape(title)).replace("{body}", body)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def embed(picture: Path | np.ndarray) -> str:
    """A picture as a data: address; PNG as it is where small, else a JPEG of at most 512 pixels."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)
    with image:
        pixels = image.convert("RGB")
    small = max(pixels.size) <= _LONGEST_SIDE // 2
    pixels.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    pixels.save(buffer, format=kind, **({"optimize": True} if small else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["", *table.columns])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td><b>{escape(v)}</b><small>{escape(note)}</small></td>" for v, note in cells)
        + "</tr>"
        for name, cells in table.rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _section(section: Section) -> str:
    if not section.comparisons:
        return ""
    cards = "".join(_comparison(comparison) for comparison in section.comparisons)
    return (
        f"<h2>{escape(section.title)}</h2><p>{escape(section.explanation)}</p>"
        f'<div class="cards">{cards}</div>'
    )


def _comparison(comparison: Comparison) -> str:
    panels = "".join(
        f'<figure><img src="{embed(panel.picture)}" loading="lazy" '
        f'alt="{escape(panel.label)}: {escape(comparison.prompt)}">'
        f"<figcaption>{escape(panel.label)}<small>{escape(panel.note)}</small></figcaption></figure>"
        for panel in comparison.panels
    )
    return f'<article><h3>{escape(comparison.prompt)}</h3><div class="row">{panels}</div></article>'


def _method(method: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in method)
    return f"<h2>How this was measured</h2><dl>{rows}</dl>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c636b; --line: #d9dde2;
  --paper: #fbfbfa; --card: #fff; --accent: #1f6f5c; --warn: #8a5a00; --warnbg: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a2a8b0; --line: #363b42;
  --paper: #16181b; --card: #1e2125; --accent: #6cc7ae; --warn: #f0c674; --warnbg: #2b2516; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 .4rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
h2 + p { margin: 0 0 .9rem; color: var(--soft); }
h3 { font-size: .92rem; font-weight: 500; margin: 0 0 .5rem; overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
.verdict { font-size: 1.35rem; line-height: 1.35; margin: 0 0 1.2rem; padding-left: .9rem;
  border-left: 4px solid var(--accent); }
.warning { color: var(--warn); background: var(--warnbg); padding: .6rem .8rem; margin: .6rem 0;
  border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 30rem);
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .8rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
.cards { display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .5rem; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { font-size: .82rem; margin-top: .25rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { display: block; } dd { margin: 0 0 .6rem; }
  .verdict { font-size: 1.15rem; }
  th, td { padding: .4rem .5rem; white-space: normal; }
  th:last-child, td:last-child { padding-right: 0; } }
</style>
</head>
<body>
{body}
</body>
</html>
"""
