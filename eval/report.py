"""Reports as one HTML file each: no script, no network, readable on a phone, light and dark.

`write_report` is the evaluation's; train/report.py builds the run's from the same pieces. A piece
is a string of HTML in which all text is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from data.files import write_atomically

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
    film: bool = False
    """One comparison below the other, its pictures wrapping where the screen is narrow."""


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
    write_page(
        path,
        title=title,
        pieces=[
            verdict_line(verdict),
            _table(table),
            *map(warning, warnings),
            *map(section_of, sections),
            facts("How this was measured", method),
        ],
    )


def write_page(path: Path, *, title: str, pieces: Sequence[str]) -> None:
    """Write title and pieces to `path`, whole or not at all."""
    body = f"<h1>{escape(title)}</h1>{''.join(pieces)}"
    before, after = _PAGE.split("{body}")
    page = before.replace("{title}", escape(title)) + body + after
    write_atomically(path, page.encode("utf-8"))


def verdict_line(text: str) -> str:
    return f'<p class="verdict">{escape(text)}</p>'


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def section_of(section: Section) -> str:
    """Heading, explanation and comparisons; nothing where there are none."""
    if not section.comparisons:
        return ""
    cards = "".join(_comparison(comparison) for comparison in section.comparisons)
    return (
        f"<h2>{escape(section.title)}</h2><p>{escape(section.explanation)}</p>"
        f'<div class="{"film" if section.film else "cards"}">{cards}</div>'
    )


def facts(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and texts in two columns; nothing where there are none."""
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f"<h2>{escape(title)}</h2><dl>{lines}</dl>" if lines else ""


def listing(title: str, summary: str, text: str) -> str:
    """A text as it is, behind a line that unfolds it."""
    return (
        f"<h2>{escape(title)}</h2><details><summary>{escape(summary)}</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def link(title: str, text: str, address: str) -> str:
    """A sentence and where to read on: an address relative to the page."""
    target = escape(address)
    return f'<h2>{escape(title)}</h2><p>{escape(text)} <a href="{target}">{target}</a></p>'


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


def _comparison(comparison: Comparison) -> str:
    panels = "".join(
        f'<figure><img src="{embed(panel.picture)}" loading="lazy" '
        f'alt="{escape(panel.label)}: {escape(comparison.prompt)}">'
        f"<figcaption>{escape(panel.label)}<small>{escape(panel.note)}</small></figcaption></figure>"
        for panel in comparison.panels
    )
    return f'<article><h3>{escape(comparison.prompt)}</h3><div class="row">{panels}</div></article>'


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
.warning + .verdict { margin-top: 1.2rem; }
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
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.film { display: grid; gap: .9rem; }
.film .row { grid-auto-flow: row;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 11rem), 1fr)); }
figcaption { font-size: .82rem; margin-top: .25rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg path { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linecap: round;
  stroke-linejoin: round; }
svg .rule { color: var(--line); stroke-width: 1; }
svg .bar { color: var(--card); fill: var(--accent); stroke-width: .6; }
.shapes > div { display: grid; align-items: center; gap: 0 .8rem; padding: .25rem 0;
  grid-template-columns: 2.75rem 6.5rem minmax(3rem, 1fr) 3.5rem 15rem;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line); }
.shapes svg { width: 2.75rem; height: 2.75rem; }
.shapes rect { fill: none; stroke: var(--accent); stroke-width: 1.5; }
.shapes b { font-weight: 500; }
.shapes .track + b { text-align: right; }
.track i { display: block; height: .8rem; border-radius: 3px; background: var(--accent); }
.sheet { display: grid; gap: 1.1rem .8rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(46%, 10rem), 1fr)); }
.sheet img { width: auto; max-width: 100%; max-height: 15rem; margin: 0 auto; }
.sheet figcaption { overflow-wrap: anywhere; line-height: 1.35; }
.sheet .clamp { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
  overflow: hidden; }
.pair { align-items: start; }
.pair img { max-height: 13rem; width: auto; max-width: 100%; }
.reasons { display: grid; gap: .4rem 1rem; }
.reasons > div { display: grid; grid-template-columns: 4.5rem 1fr; gap: .8rem; align-items: center;
  border-bottom: 1px solid var(--line); padding: .3rem 0; }
.reasons > .plain { grid-template-columns: 1fr; }
.reasons img { width: 4.5rem; max-height: 4.5rem; object-fit: contain; border-radius: 4px; }
.reasons b { font-weight: 500; overflow-wrap: anywhere; }
.words { display: flex; flex-wrap: wrap; gap: .35rem; }
.words span { background: var(--card); border: 1px solid var(--line); border-radius: 999px;
  padding: .1rem .6rem; font-size: .85rem; }
.words small { display: inline; margin-left: .35rem; }
h2 + .words, h2 + .reasons { margin-top: .6rem; }
details { margin: .6rem 0; }
details > .reasons { margin-top: .5rem; }
.main { color: var(--accent); }
.pale { color: var(--soft); }
svg .pale { stroke-width: 1; opacity: .55; }
.limit { color: var(--warn); }
svg .limit { stroke-width: 1.2; stroke-dasharray: 5 4; }
.q1 { color: var(--accent); }
.q2 { color: #3f7fbf; }
.q3 { color: #a668b5; }
.q4 { color: #c56a4a; }
.key { margin: .2rem 0 0; font-size: .8rem; }
.key span { margin-right: 1rem; }
.key span::before { content: ""; display: inline-block; width: 1.1em; margin-right: .4em;
  vertical-align: middle; border-top: 2px solid; }
.key .limit::before { border-top-style: dashed; }
summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem; font-size: .82rem; line-height: 1.45; }
a { color: var(--accent); }
@media (max-width: 46rem) { .shapes > div {
  grid-template-columns: 2.75rem 6rem 1fr 3rem; } .shapes small { grid-column: 2 / -1; } }
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
