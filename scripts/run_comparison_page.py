"""A comparison of runs as text for the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from eval.charts import MANY, Chart, Curve, charts
from eval.report import (
    Comparison,
    Panel,
    Section,
    heading,
    section_of,
    table_of,
    verdict_line,
    warning,
    write_page,
)
from scripts import run_comparison, run_tables
from scripts.run_comparison import Compared, Row
from train import overfitting
from train.report_charts import SCORES
from train.report_pieces import readable, spread
from train.run_figures import smooth
from train.run_record import Run

_PROMPTS = 12  # whose previews are shown
_NOT_PAIRED = "Each interval is of one run alone, so two that overlap may still differ."
_WIDE = 40  # characters of a setting in the terminal


def text(compared: Compared) -> str:
    """Tables and the verdict, for the terminal."""
    parts = [
        _aligned("settings that differ", compared, run_comparison.differing(compared)),
        _aligned("results", compared, run_comparison.results(compared)),
        _aligned("scores (each interval of one run alone)", compared, _scores(compared)),
    ]
    found, why = compared.evaluated
    if found:
        from eval.comparison_report import aligned, table

        parts += [
            aligned(table(found.of(second))) for second in found.sides[1:] if found.of(second)
        ]
    elif _scores(compared):
        parts.append(f"note: no paired tests of scores: {why}")
    return "\n\n".join(filter(None, [*parts, run_comparison.verdict(compared)]))


def write(compared: Compared, path: Path) -> None:
    write_page(path, title=compared.title, pieces=list(_pieces(compared, path)), script=_SCRIPT)


_SCRIPT = run_tables.SCRIPT


def _pieces(compared: Compared, path: Path) -> Iterator[str]:
    yield verdict_line(run_comparison.verdict(compared))
    yield from map(warning, _notes(compared))
    yield heading("The runs") + run_tables.table(compared.summaries, path)
    yield _table("What differs", "Settings that are not the same in all.", compared, "settings")
    yield _paired(compared)
    yield _table("Scores", _NOT_PAIRED, compared, "scores")
    yield _curves(compared)
    yield section_of(_previews(compared))


def _notes(compared: Compared) -> list[str]:
    found, why = compared.evaluated
    if found:
        return list(found.notes)
    has_scores = any(one.scores for one in compared.summaries)
    return [f"No paired tests of scores: {why}."] if has_scores else []


def _scores(compared: Compared) -> list[Row]:
    """Those of evaluations; where they are paired, they stand in the tests' tables."""
    found, _ = compared.evaluated
    tested = {test.title for test in found.tests} if found else set()
    rows = run_comparison.scores(compared)
    return [row for row in rows if row.name.partition(" (")[0] not in tested]


def _table(title: str, explanation: str, compared: Compared, what: str) -> str:
    of: dict[str, Callable[[Compared], Sequence[Row]]] = {
        "settings": run_comparison.differing,
        "scores": _scores,
    }
    rows = of[what](compared)
    if not rows:
        return ""
    heads = "".join(f'<th scope="col" class="text">{escape(n)}</th>' for n in compared.names)
    lines = "".join(
        f'<tr><td class="text">{escape(row.name).replace(".", ".<wbr>")}</td>'
        + "".join(
            f'<td class="text wrap">{escape(text)}<small>{escape(note)}</small></td>'
            for text, note in row.cells
        )
        + "</tr>"
        for row in rows
    )
    return (
        f"{heading(title, explanation)}"
        '<div class="wide"><table class="listed"><thead><tr><th></th>'
        f"{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _paired(compared: Compared) -> str:
    """Tests of the evaluations' scores over the same prompts and seeds."""
    found, _ = compared.evaluated
    if not found or not found.tests:
        return ""
    from eval.comparison_report import table

    said = (
        "Differences from the first run, on the same prompts and seeds. eval/compare.py tells more."
    )
    tables = (table_of(table(found.of(second))) for second in found.sides[1:] if found.of(second))
    return heading("Paired scores", said) + "".join(tables)


def _curves(compared: Compared) -> str:
    drawn = [
        _chart(compared, "Training loss", "mean squared error, smoothed", _loss),
        _chart(compared, "Held-out loss", "less is better, ± standard error", _held_out),
        _chart(compared, "Learning rate", "learning rate", _column("lr")),
        _chart(compared, "Speed", "images per second", _column("images_per_second")),
        *(_score_chart(compared, name) for name in _scored(compared.runs)),
    ]
    return charts("Curves", "", drawn)


def _scored(runs: Sequence[Run]) -> list[str]:
    names = (name for run in runs for one in run.examinations for name in one.scores)
    return list(dict.fromkeys(names))


_Points = tuple[Sequence[float], Sequence[float], Sequence[float] | None]


def _chart(compared: Compared, title: str, unit: str, points: Callable[[Run], _Points]) -> Chart:
    curves = []
    for name, run, look in zip(compared.names, compared.runs, MANY, strict=False):
        x, values, spread = points(run)
        curves.append(Curve(name, values, look, spread=spread, x=x))
    return Chart(title, unit, "optimizer steps", [], curves, from_zero=False)


def _loss(run: Run) -> _Points:
    return run.steps, smooth(run.column("loss")), None


def _held_out(run: Run) -> _Points:
    measured = run.validations
    errors = [overfitting.standard_error(one.held_out.of_pictures("loss")) for one in measured]
    return [float(one.step) for one in measured], [one.value("loss") for one in measured], errors


def _column(key: str) -> Callable[[Run], _Points]:
    return lambda run: (run.steps, run.column(key), None)


def _score_chart(compared: Compared, name: str) -> Chart:
    def points(run: Run) -> _Points:
        found = run.examinations
        return [float(one.step) for one in found], [one.value(name) for one in found], None

    title, meaning = SCORES.get(name, (name.replace("_", " "), "score"))
    return _chart(compared, title, meaning, points)


def _previews(compared: Compared) -> Section:
    rows, same = [], run_comparison.have_the_same_noise(compared)
    for shared in spread(run_comparison.shared_previews(compared), _PROMPTS):
        named = [*shared.bases, *shared.pictures]
        panels = [Panel(file, label) for label, file in named if readable(file)]
        rows.append(Comparison(f"{shared.prompt} (seed {shared.seed})", panels))
    return Section(
        "Last previews",
        "The same prompt and the same noise."
        if same
        else "The same prompt and seed; the sizes differ, and so does the noise.",
        [row for row in rows if row.panels],
        film=True,
        small=True,
    )


def _aligned(title: str, compared: Compared, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [[title, *compared.names]]
    lines += [
        [row.name, *(_short(f"{text} [{note}]" if note else text) for text, note in row.cells)]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _short(text: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= _WIDE else f"{plain[: _WIDE - 1]}…"
