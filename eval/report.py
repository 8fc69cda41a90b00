"""Reports as one HTML file each: no network, readable on a phone, light and dark, complete without
a script.

The evaluation's (eval/presentation.py), the run's (train/report.py) and the dataset's
(eval/dataset_report.py) are built from the same pieces. A piece is a string of HTML in which all
text is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.files import write_atomically
from eval.page import PAGE

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 360  # pixels of the longer side, where there are hundreds of pictures
_BYTES_A_PIXEL = 100  # of `longest`: above it a small picture is not kept exactly
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
    small: bool = False
    """Pictures as thumbnails, and one comparison more in a row."""


@dataclass(frozen=True)
class Grid:
    """Pictures in rows with a label each, aligned in columns; `heads` stand above the columns."""

    title: str
    note: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Panel]]]


@dataclass(frozen=True)
class Table:
    """Rows of a name and cells; a cell is a value and a small print below it (say an interval)."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]


def write_page(path: Path, *, title: str, pieces: Sequence[str], script: str = "") -> None:
    """Write title and pieces to `path`, whole or not at all.

    script: the only one that the page may run, by its hash; the page must be complete without it.
    """
    body = f"<h1>{escape(title)}</h1>{''.join(pieces)}"
    policy = ""
    if script:
        body += f"<script>{script}</script>"
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"; script-src 'sha256-{digest}'"
    before, after = PAGE.split("{body}")
    page = before.replace("{policy}", policy).replace("{title}", escape(title)) + body + after
    write_atomically(path, page.encode("utf-8"))


def verdict_line(text: str) -> str:
    return f'<p class="verdict">{escape(text)}</p>'


def warning(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def section_of(section: Section) -> str:
    """Heading, explanation and comparisons; nothing where there are none."""
    if not section.comparisons:
        return ""
    longest = THUMBNAIL if section.small else _LONGEST_SIDE
    cards = "".join(_comparison(each, longest) for each in section.comparisons)
    kind = "film" if section.film else "cards close" if section.small else "cards"
    return f'{heading(section.title, section.explanation)}<div class="{kind}">{cards}</div>'


def grids_of(title: str, explanation: str, grids: Sequence[Grid]) -> str:
    """Heading, explanation and grids; nothing where there are none."""
    cards = "".join(map(_grid, grids))
    return f'{heading(title, explanation)}<div class="grids">{cards}</div>' if cards else ""


def heading(title: str, explanation: str = "") -> str:
    """A heading and a sentence below it, where there are any."""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return head + (f"<p>{escape(explanation)}</p>" if explanation else "")


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


def embed(picture: Path | np.ndarray, longest: int = _LONGEST_SIDE) -> str:
    """A picture as a data: address: as it is (PNG) where it is small, else a JPEG whose longer side
    has at most `longest` pixels."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)
    with image:
        pixels = image.convert("RGB")
    if max(pixels.size) <= longest // 2:
        content = _encoded(pixels, "png", optimize=True)
        if len(content) <= _BYTES_A_PIXEL * longest:
            return _address("png", content)
    pixels.thumbnail((longest, longest))
    return _address("jpeg", _encoded(pixels, "jpeg", quality=90 if longest > 400 else 85))


def _encoded(pixels: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, format=kind, **how)
    return buffer.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def table_of(table: Table) -> str:
    """The table, in a box of its own that scrolls where the screen is too narrow."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["", *table.columns])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td><b>{escape(v)}</b><small>{escape(note)}</small></td>" for v, note in cells)
        + "</tr>"
        for name, cells in table.rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _comparison(comparison: Comparison, longest: int) -> str:
    panels = "".join(figure(panel, comparison.prompt, longest) for panel in comparison.panels)
    title = f"<h3>{escape(comparison.prompt)}</h3>" if comparison.prompt else ""
    return f'<article>{title}<div class="row">{panels}</div></article>'


def figure(panel: Panel, prompt: str, longest: int = _LONGEST_SIDE) -> str:
    """One picture with its label and note; `prompt` is for those who cannot see it."""
    note = f"<small>{escape(panel.note)}</small>" if panel.note else ""
    said = f"{panel.label}: {prompt}" if prompt else panel.label
    return (
        f'<figure><img src="{embed(panel.picture, longest)}" loading="lazy" alt="{escape(said)}">'
        f"<figcaption>{escape(panel.label)}{note}</figcaption></figure>"
    )


def _grid(grid: Grid) -> str:
    columns = max(len(panels) for _, panels in grid.rows)
    heads = "".join(f'<span class="seed">{escape(head)}</span>' for head in grid.heads)
    top = f'<span class="corner"></span>{heads}' if heads else ""
    rows = "".join(
        f'<span class="arm">{escape(name)}</span>'
        + "".join(_in_grid(panel, f"{name}: {grid.title}") for panel in panels)
        + "<span></span>" * (columns - len(panels))
        for name, panels in grid.rows
    )
    title = f"<h3>{escape(grid.title)}<small>{escape(grid.note)}</small></h3>"
    return f'<article>{title}<div class="grid" style="--n:{columns}">{top}{rows}</div></article>'


def _in_grid(panel: Panel, said: str) -> str:
    return (
        f'<figure><img src="{embed(panel.picture, THUMBNAIL)}" loading="lazy" '
        f'alt="{escape(said)}"><figcaption>{escape(panel.note)}</figcaption></figure>'
    )
