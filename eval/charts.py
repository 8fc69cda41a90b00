"""Charts as pieces of a report: SVG in HTML, without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from eval.report import heading

_WIDTH, _HEIGHT = 400, 200  # of a chart, in units of its text's pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 392, 26, 168  # of the area inside its axes
_COLUMNS = 300  # of a curve; within one only the least and the largest value are drawn

# fmt: off
Look = Literal["main", "pale", "limit", "q1", "q2", "q3", "q4",
               "q1 dashed", "q2 dashed", "q3 dashed", "q4 dashed"]
# fmt: on
MANY: tuple[Look, ...] = (
    "q1",
    "q2",
    "q3",
    "q4",
    "q1 dashed",
    "q2 dashed",
    "q3 dashed",
    "q4 dashed",
)
"""Of curves that are alike, in order."""


@dataclass(frozen=True)
class Curve:
    """A value (not finite: a gap) at every x of its chart."""

    name: str
    values: Sequence[float]
    look: Look = "main"
    spread: Sequence[float] | None = None
    """So far above and below each value a stroke reaches."""
    intervals: Sequence[tuple[float, float]] | None = None
    """Or from where to where (not finite: no stroke)."""
    x: Sequence[float] | None = None
    """Where its values are, if not where its chart says."""


@dataclass(frozen=True)
class Chart:
    """Curves over one x axis; `y_label` and `x_label` name the units."""

    title: str
    y_label: str
    x_label: str
    x: Sequence[float]
    curves: Sequence[Curve]
    from_zero: bool = True
    mark: tuple[float, str] | None = None
    """Where on the x axis a line stands, and what it says."""


@dataclass(frozen=True)
class Histogram:
    """How many fall between two neighbouring `edges` (n + 1); `limit` is drawn as a line."""

    title: str
    y_label: str
    x_label: str
    edges: Sequence[float]
    counts: Sequence[int]
    limit: float | None = None


@dataclass(frozen=True)
class Bar:
    """A rectangle of this width and height, and a number drawn as a bar beside it."""

    shape: tuple[int, int]
    label: str
    number: int
    note: str = ""


@dataclass(frozen=True)
class Share:
    """A part of a whole, and its number in words."""

    name: str
    number: float
    text: str


def charts(title: str, explanation: str, drawn: Sequence[Chart]) -> str:
    """Charts side by side; one without a finite value is left out."""
    cards = "".join(_chart(chart) for chart in drawn)
    return f'{heading(title, explanation)}<div class="cards pairs">{cards}</div>' if cards else ""


def histograms(title: str, explanation: str, drawn: Sequence[Histogram]) -> str:
    """Histograms side by side; nothing where there are none."""
    cards = "".join(_histogram(each) for each in drawn)
    return f'{heading(title, explanation)}<div class="cards pairs">{cards}</div>' if cards else ""


def shapes(title: str, explanation: str, bars: Sequence[Bar]) -> str:
    """Rectangles in proportion to each other, each with its bar; nothing where there are none."""
    longest = max((max(bar.shape) for bar in bars), default=1)
    most = max((bar.number for bar in bars), default=1)
    rows = "".join(_shape(bar, 40 / longest, 100 / most) for bar in bars)
    return f'{heading(title, explanation)}<div class="shapes">{rows}</div>' if rows else ""


def shares(title: str, explanation: str, parts: Sequence[Share]) -> str:
    """Parts of a whole as bars one below the other; nothing where there are none."""
    whole = sum(part.number for part in parts)
    rows = "".join(
        f'<div><b>{escape(part.name)}</b><span class="track"><i style="width:'
        f'{100 * part.number / whole:.1f}%"></i></span><span>{escape(part.text)}</span>'
        f"<span>{100 * part.number / whole:.1f} %</span></div>"
        for part in parts
        if whole
    )
    return f'{heading(title, explanation)}<div class="shares">{rows}</div>' if rows else ""


def _chart(chart: Chart) -> str:
    finite = [v for curve in chart.curves for v in _reached(curve) if math.isfinite(v)]
    if not finite:
        return ""
    y_ticks = _ticks(min([*finite, 0.0] if chart.from_zero else finite), max(finite))
    x_span = _x_span([at for curve in chart.curves for at in _across(chart, curve)])
    x_ticks = [tick for tick in _ticks(*x_span) if x_span[0] <= tick <= x_span[1]]
    y_span = (y_ticks[0], y_ticks[-1])
    paths = "".join(
        f'<path class="{curve.look}" d="{_path(x, curve.values, x_span, y_span)}'
        f'{_strokes(x, curve, x_span, y_span)}"/>'
        for curve, x in ((curve, _across(chart, curve)) for curve in chart.curves)
    )
    rules = "".join(_y_rule(tick, y_span) for tick in y_ticks)
    marks = "".join(_x_mark(tick, x_span) for tick in x_ticks)
    several = [(c.look, c.name) for c in chart.curves if len(chart.curves) > 1 or chart.mark]
    if chart.mark:
        at, name = chart.mark
        across = _place(at, x_span, _LEFT, _RIGHT)
        paths += f'<path class="limit" d="M{across} {_TOP}V{_BOTTOM}"/>'
        several.append(("limit", name))
    key = "".join(f'<span class="{look}">{escape(name)}</span>' for look, name in several)
    label = escape(f"{chart.title}, {chart.y_label}, over {chart.x_label}")
    return (
        f'<article><h3>{escape(chart.title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{label}">{rules}{marks}<text x="0" y="11">{escape(chart.y_label)}</text>'
        f'<text class="end" x="{_RIGHT}" y="{_HEIGHT - 3}">{escape(chart.x_label)}</text>'
        f'{paths}</svg><p class="key">{key}</p></article>'
    )


def _across(chart: Chart, curve: Curve) -> Sequence[float]:
    return chart.x if curve.x is None else curve.x


def _histogram(histogram: Histogram) -> str:
    y_ticks = _ticks(0.0, max(histogram.counts))
    x_span, y_span = (histogram.edges[0], histogram.edges[-1]), (0.0, y_ticks[-1])
    if histogram.limit is not None:
        x_span = (min(x_span[0], histogram.limit), max(x_span[1], histogram.limit))
    x_ticks = [tick for tick in _ticks(*x_span) if x_span[0] <= tick <= x_span[1]]
    bars = "".join(
        f'<path class="bar" d="M{_place(left, x_span, _LEFT, _RIGHT)} {_BOTTOM}'
        f"V{_place(count, y_span, _BOTTOM, _TOP)}"
        f'H{_place(right, x_span, _LEFT, _RIGHT)}V{_BOTTOM}z"/>'
        for left, right, count in zip(
            histogram.edges, histogram.edges[1:], histogram.counts, strict=False
        )
        if count
    )
    limit = ""
    if histogram.limit is not None:
        at = _place(histogram.limit, x_span, _LEFT, _RIGHT)
        limit = f'<path class="limit" d="M{at} {_TOP}V{_BOTTOM}"/>'
    rules = "".join(_y_rule(tick, y_span) for tick in y_ticks)
    # A number in the middle of the last mark would stand out of the picture.
    marks = "".join(_x_mark(tick, x_span) for tick in x_ticks if tick < 0.97 * x_span[1])
    label = escape(f"{histogram.title}: {histogram.y_label} by {histogram.x_label}")
    return (
        f'<article><h3>{escape(histogram.title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{label}">{rules}{marks}'
        f'<text x="0" y="11">{escape(histogram.y_label)}</text>'
        f'<text class="end" x="{_RIGHT}" y="{_HEIGHT - 3}">{escape(histogram.x_label)}</text>'
        f"{bars}{limit}</svg></article>"
    )


def _shape(bar: Bar, scale: float, share: float) -> str:
    width, height = (side * scale for side in bar.shape)
    return (
        f'<div><svg viewBox="0 0 44 44" role="img" aria-label="{escape(bar.label)}">'
        f'<rect x="{22 - width / 2:.1f}" y="{22 - height / 2:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"/></svg><b>{escape(bar.label)}</b>'
        f'<span class="track"><i style="width:{bar.number * share:.1f}%"></i></span>'
        f"<b>{bar.number:,}</b><small>{escape(bar.note)}</small></div>"
    )


def _path(
    x: Sequence[float],
    y: Sequence[float],
    x_span: tuple[float, float],
    y_span: tuple[float, float],
) -> str:
    """SVG path data; values that are not finite break the curve, a lone one is a dot."""
    strokes: list[list[str]] = [[]]
    for at, value in _thin(list(zip(x, y, strict=True))):
        if math.isfinite(value):
            across = _place(at, x_span, _LEFT, _RIGHT)
            strokes[-1].append(f"{across} {_place(value, y_span, _BOTTOM, _TOP)}")
        elif strokes[-1]:
            strokes.append([])
    return "".join(f"M{'L'.join(stroke)}h0" for stroke in strokes if stroke)


def _ends(curve: Curve) -> list[tuple[float, float]]:
    """From where to where the stroke at each value goes; nan where there is none."""
    if curve.intervals is not None:
        return list(curve.intervals)
    spread = curve.spread or [math.nan] * len(curve.values)
    return [(v - reach, v + reach) for v, reach in zip(curve.values, spread, strict=True)]


def _reached(curve: Curve) -> list[float]:
    """All heights that a curve and its strokes come to."""
    return [*curve.values, *(end for ends in _ends(curve) for end in ends)]


def _strokes(
    x: Sequence[float], curve: Curve, x_span: tuple[float, float], y_span: tuple[float, float]
) -> str:
    """SVG path data of what is drawn above and below the values."""
    return "".join(
        f"M{_place(at, x_span, _LEFT, _RIGHT)} {_place(low, y_span, _BOTTOM, _TOP)}"
        f"V{_place(high, y_span, _BOTTOM, _TOP)}"
        for at, (low, high) in zip(x, _ends(curve), strict=True)
        if math.isfinite(low) and math.isfinite(high)
    )


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most two points for each of _COLUMNS equal parts: no spike is lost, no page is huge."""
    size = -(-len(points) // _COLUMNS)
    if size <= 2:
        return points
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        finite = [(y, x) for x, y in points[start : start + size] if math.isfinite(y)]
        ends = sorted((x, y) for y, x in {min(finite), max(finite)}) if finite else []
        kept += ends or [points[start]]
    return kept


def _ticks(low: float, high: float) -> list[float]:
    """Up to six or so evenly spaced round numbers, the outer two at or beyond low and high."""
    high = high if high > low else low + (abs(low) or 1.0)
    rough = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if size * factor >= rough)
    return [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _x_span(x: Sequence[float]) -> tuple[float, float]:
    """From 0, unless a value is below it, to the largest value."""
    least = min(0.0, *x, math.inf)
    return least, max(x) if max(x) > least else least + 1.0


def _place(value: float, span: tuple[float, float], start: float, end: float) -> str:
    return f"{start + (value - span[0]) / (span[1] - span[0]) * (end - start):.4g}"


def _y_rule(tick: float, span: tuple[float, float]) -> str:
    y = _place(tick, span, _BOTTOM, _TOP)
    return (
        f'<path class="rule" d="M{_LEFT} {y}H{_RIGHT}"/>'
        f'<text class="end" x="{_LEFT - 6}" y="{y}" dy="4">{_tick_label(tick)}</text>'
    )


def _x_mark(tick: float, span: tuple[float, float]) -> str:
    x = _place(tick, span, _LEFT, _RIGHT)
    anchor = "end" if float(x) > _RIGHT - 12 else "middle"  # no label is cut at the chart's edge
    return f'<text class="{anchor}" x="{x}" y="{_BOTTOM + 15}">{_tick_label(tick)}</text>'


def _tick_label(tick: float) -> str:
    return f"{tick:,.7g}".replace("e-0", "e-").replace("e+0", "e")
