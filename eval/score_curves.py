"""How the scores go with the checkpoints and with the scale of the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.charts import Chart, Curve, charts
from eval.score_table import scores_of

_NOWHERE = (math.nan, math.nan)


def over_checkpoints(metrics: Mapping[str, Any]) -> str:
    """A chart for each score over the optimizer steps; step 0 is the base."""
    points = (metrics.get("curves") or {}).get("checkpoints") or []
    said = "Measured during training, on fewer pictures than the table above. Step 0: the base."
    return charts("Over checkpoints", said, _drawn(metrics, points, "step", "optimizer steps"))


def over_scales(metrics: Mapping[str, Any]) -> str:
    """A chart for each score over the adapter scale."""
    points = (metrics.get("curves") or {}).get("scales") or []
    said = "How strongly the adapter is applied: 0 is the base, 1 the adapter as trained."
    return charts("Over the adapter's scale", said, _drawn(metrics, points, "scale", "scale"))


def _drawn(
    metrics: Mapping[str, Any], points: Sequence[Mapping[str, Any]], what: str, x_label: str
) -> list[Chart]:
    points = sorted(points, key=lambda point: point[what])
    measured = {key for point in points for key in point["scores"]}
    scores = scores_of(metrics)
    keys = [*(key for key in scores if key in measured), *sorted(measured - scores.keys())]
    return [_chart(metrics, points, what, x_label, key) for key in keys if len(points) > 1]


def _chart(
    metrics: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    what: str,
    x_label: str,
    key: str,
) -> Chart:
    score = scores_of(metrics).get(key)
    title = score.title if score else key.replace("_", " ")
    better = f"{score.better} is better" if score and score.better else "value"
    found = [_value(point["scores"].get(key)) for point in points]
    curve = Curve(title, [value for value, _ in found], intervals=[ends for _, ends in found])
    return Chart(title, better, x_label, [point[what] for point in points], [curve], False)


def _value(content: Any) -> tuple[float, tuple[float, float]]:
    """A value and its interval, from a number or {"value", "low", "high"}; nan where unknown."""
    if not isinstance(content, Mapping):
        return (math.nan if content is None else float(content)), _NOWHERE
    low, high = content.get("low"), content.get("high")
    ends = _NOWHERE if low is None or high is None else (float(low), float(high))
    return _value(content.get("value"))[0], ends
