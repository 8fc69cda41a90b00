"""Lists of runs as a table for the terminal and as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from data.checks import many
from eval.figures import number
from eval.report import verdict_line, warning, write_page
from scripts.run_listing import Score, Summary, moment
from train import run_state
from train.screens import duration

_LEAST = ("base", "images", "loss", "method", "ended", "speed", "time")
"""Columns that a narrow terminal does without, the first first."""
_LONG = 44  # characters of a name in the terminal
_NAMED = 8  # folders that are said to be passed over

SCRIPT = """
for (const table of document.querySelectorAll("table.listed")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, k) => row.cells[k].dataset.value ?? row.cells[k].textContent.trim();
  heads.forEach((head, k) => head.querySelector("button")?.addEventListener("click", () => {
    const rises = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rises ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    const compared = (a, b) => {
      const one = value(a, k), two = value(b, k);
      if (one === "" || two === "") return (one === "") - (two === "");
      const numbers = !isNaN(one) && !isNaN(two);
      return (rises ? 1 : -1) * (numbers ? one - two : one.localeCompare(two));
    };
    rows.sort(compared).forEach((row) => table.tBodies[0].append(row));
  }));
}
"""
"""Sorts a table by the column whose head is pressed; empty cells come last."""


@dataclass(frozen=True)
class Cell:
    """What a cell says, and what it is sorted by."""

    text: str
    value: float | str | None = None
    small: str = ""


@dataclass(frozen=True)
class Column:
    """`key` is what runs are sorted by."""

    key: str
    title: str
    cell: Callable[[Summary], Cell]
    is_text: bool = False


def columns(runs: Sequence[Summary]) -> list[Column]:
    """Those in which any run has something."""
    wanted = [
        Column("name", "run", lambda run: Cell(run.name), True),
        Column("state", "state", lambda run: Cell(run.state.name), True),
        Column("method", "method", lambda run: Cell(run.method), True),
        Column("base", "base", lambda run: Cell(run.base), True),
        Column("steps", "steps", _steps),
        Column("images", "images", lambda run: _counted(run.images)),
        Column("loss", "loss", lambda run: _figure(run.loss)),
        Column("held_out", "best held-out loss", _held_out),
        *(_score_column(name, runs) for name in _score_names(runs)),
        Column("speed", "images/s", lambda run: _figure(run.speed)),
        Column("time", "training time", _time),
        Column("ended", "last line", _ended),
    ]
    return [column for column in wanted if any(column.cell(run).text for run in runs)]


def terminal(runs: Sequence[Summary], *, width: int | None) -> str:
    """The table in columns of text, as wide as `width` characters if given."""
    shown = columns(runs)
    lines = _lines(shown, runs)
    for key in _LEAST:
        if width is None or max(map(len, lines)) <= width:
            break
        shown = [column for column in shown if column.key != key]
        lines = _lines(shown, runs)
    return "\n".join(lines)


def summed(runs: Sequence[Summary]) -> str:
    """How many there are in each state."""
    if not runs:
        return "no runs"
    names = get_args(run_state.Name)
    counts = [(sum(run.state.name == name for run in runs), name) for name in names]
    return f"{many(len(runs), 'run')}: " + ", ".join(f"{n:,} {name}" for n, name in counts if n)


def passed_over(skipped: Sequence[str]) -> str:
    """What is said of folders that are no runs; "" where there are none."""
    if not skipped:
        return ""
    rest = len(skipped) - _NAMED
    more = f" and {rest:,} more" if rest > 0 else ""
    return f"passed over: {', '.join(skipped[:_NAMED])}{more}"


def write_list(
    path: Path, runs: Sequence[Summary], skipped: Sequence[str], *, title: str, wanted: str = ""
) -> None:
    """The page, whose columns sort where a script may run. wanted: what the list was cut to."""
    said = f"{summed(runs).capitalize()}{f', of those with {wanted}' if wanted else ''}."
    write_page(
        path,
        title=title,
        pieces=[verdict_line(said), table(runs, path), _left_out(skipped)],
        script=SCRIPT,
    )


def table(runs: Sequence[Summary], page: Path) -> str:
    """As HTML; names lead to the runs' reports where there are any."""
    shown = columns(runs)
    heads = "".join(
        f'<th scope="col" class="{"text" if column.is_text else ""}"><button type="button">'
        f"{escape(_led(column.title))}</button></th>"
        for column in shown
    )
    best = {column.key: _best(column, runs) for column in shown}
    rows = "".join(
        "<tr>" + "".join(_html(column, run, page, best[column.key]) for column in shown) + "</tr>"
        for run in runs
    )
    return (
        f'<div class="wide"><table class="listed stacked"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _html(column: Column, run: Summary, page: Path, most: float | str | None) -> str:
    cell = column.cell(run)
    best = most is not None and cell.value == most
    text = f"<b>{escape(cell.text)}</b>" if best else escape(cell.text)
    if column.key == "name":
        text = _linked(run, page)
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    kinds = " ".join([*(["text"] if column.is_text else []), *(["best"] if best else [])])
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    label = escape(_led(column.title))
    return f'<td class="{kinds}" data-label="{label}"{value}>{text}{small}</td>'


def _led(title: str) -> str:
    return title[:1].upper() + title[1:]


def _linked(run: Summary, page: Path) -> str:
    report = run.folder / "report.html"
    if not report.is_file():
        return escape(run.name)
    target = os.path.relpath(report.absolute(), page.absolute().parent)
    return f'<a href="{quote(target)}">{escape(run.name)}</a>'


def _best(column: Column, runs: Sequence[Summary]) -> float | str | None:
    """The best held-out loss or score, where there are several."""
    scored = [run.scores[column.key] for run in runs if column.key in run.scores]
    if column.key != "held_out" and not (scored and scored[0].better):
        return None
    values = [cell.value for run in runs if isinstance((cell := column.cell(run)).value, float)]
    if len(set(values)) < 2:
        return None
    return max(values) if scored and scored[0].better == "more" else min(values)


def _lines(shown: Sequence[Column], runs: Sequence[Summary]) -> list[str]:
    rows = [[column.title for column in shown]]
    rows += [[_plain(column.cell(run)) for column in shown] for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            text.ljust(width) if column.is_text else text.rjust(width)
            for text, width, column in zip(row, widths, shown, strict=True)
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def _plain(cell: Cell) -> str:
    text = "".join(c if c.isprintable() else "?" for c in cell.text)
    text = text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"
    return f"{text} {cell.small}" if cell.small else text


def _steps(run: Summary) -> Cell:
    planned = "" if run.planned is None else f"of {run.planned:,}"
    return Cell(f"{run.done:,}", run.done, planned if run.done != run.planned else "")


def _held_out(run: Summary) -> Cell:
    if run.held_out is None:
        return Cell("")
    error = "" if run.held_out_error is None else f"± {number(run.held_out_error)}"
    return Cell(number(run.held_out), run.held_out, error)


def _time(run: Summary) -> Cell:
    return Cell("") if run.seconds is None else Cell(duration(run.seconds), run.seconds)


def _ended(run: Summary) -> Cell:
    if run.ended is None:
        return Cell("")
    day, time = moment(run.ended).split()
    return Cell(day, run.ended, time)


def _counted(value: int | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:,}", value)


def _figure(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(number(value), value)


def _score_names(runs: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.scores))


def _score_column(name: str, runs: Sequence[Summary]) -> Column:
    score = next(run.scores[name] for run in runs if name in run.scores)
    arrow = {"less": " ↓", "more": " ↑"}.get(score.better or "", "")
    return Column(name, f"{score.title}{arrow}", lambda run: score_cell(run.scores.get(name)))


def score_cell(score: Score | None) -> Cell:
    """A score with its interval."""
    if score is None:
        return Cell("")
    known = score.low is not None and score.high is not None
    ends = f"[{number(score.low or 0.0)}, {number(score.high or 0.0)}]" if known else ""
    return Cell(number(score.value), score.value, ends)


def _left_out(skipped: Sequence[str]) -> str:
    said = passed_over(skipped)
    return warning(f"{said[0].upper()}{said[1:]}.") if said else ""


def as_json(runs: Sequence[Summary], skipped: Sequence[str]) -> dict[str, Any]:
    return {"runs": [run.as_dict() for run in runs], "passed_over": list(skipped)}
