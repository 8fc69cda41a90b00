"""An evaluation's metrics as report.html: whether to keep the adapter, then the pictures, then how
each number came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval import galleries, pairs, score_curves
from eval.galleries import Gallery, RealPicture
from eval.provenance import how_computed
from eval.report import Table, facts, heading, table_of, verdict_line, warning, write_page
from eval.score_table import columns, console, legend, main_table, scores_of

__all__ = ["RealPicture", "console", "present"]

_MARKS = {"keep": "\u2713 Keep it", "unclear": "? In doubt", "leave": "\u2717 Leave it"}
_WIDE = 4  # columns of a table that leaves no room beside it


def present(metrics: dict[str, Any], folder: Path, picture: RealPicture) -> None:
    """Write folder/report.html, whole or not at all, from metrics.json's content and the pictures
    in the folder; what is missing is left out."""
    gallery = Gallery(metrics, folder, picture)
    write_page(
        folder / "report.html",
        title=f"Evaluation of {metrics['title']}",
        pieces=[
            _verdict(metrics),
            warning(" ".join(metrics["warnings"])) if metrics.get("warnings") else "",
            _first(gallery),
            galleries.prompts_and_seeds(gallery),
            galleries.extremes(gallery),
            pairs.nearest_training(gallery),
            pairs.nearest_held_out(gallery),
            pairs.forgotten(gallery),
            pairs.of_the_class(gallery),
            score_curves.over_checkpoints(metrics),
            score_curves.over_scales(metrics),
            pairs.in_motion(gallery),
            _votes(metrics.get("votes")),
            _power(metrics.get("power") or []),
            facts("How each number was computed", how_computed(metrics)),
        ],
    )


def _verdict(metrics: Mapping[str, Any]) -> str:
    keep, said = metrics.get("keep"), str(metrics["verdict"])
    if keep not in _MARKS:
        return verdict_line(said)
    return f'<p class="verdict judged {keep}"><b>{_MARKS[keep]}</b>{escape(said)}</p>'


def _first(gallery: Gallery) -> str:
    """The main table with pictures beside it, or above it where it is wide."""
    over = len(columns(gallery.metrics, scores_of(gallery.metrics))) > _WIDE
    numbers = f"<div>{main_table(gallery.metrics)}{legend(gallery.metrics)}</div>"
    pictures = galleries.strip(gallery, 5 if over else 4)
    return f'<div class="first{" over" if over else ""}">{numbers}{pictures}</div>'


def _power(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    said = "How small a difference these numbers could have shown."
    return f'{heading("What could be seen", said)}<ul class="plainly">{items}</ul>' if items else ""


def _votes(votes: Mapping[str, Any] | None) -> str:
    """What people said, as eval/votes.py has it: `said`, and `columns` and `rows` of a table."""
    if not votes:
        return ""
    rows = [
        (str(name), [(str(v), str(note)) for v, note in cells]) for name, cells in votes["rows"]
    ]
    return heading("What people said", votes["said"]) + table_of(Table(votes["columns"], rows))
