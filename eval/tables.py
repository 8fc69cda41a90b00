"""An evaluation's numbers as CSV, for a spreadsheet or a script of one's own."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_atomically
from eval.scores import Score

_SCORES = ["metric", "arm", "value", "low", "high", "n", "better"]
_NEAREST = ("nearest_training", "nearest_held_out")


def write_csv(metrics: Mapping[str, Any], folder: Path) -> None:
    """Write folder/scores.csv (a row for each metric and arm, `change` among the arms) and
    folder/samples.csv (a row for each prompt and seed: files, raw scores, nearest real pictures).

    Numbers have all their digits; what is not known is empty.
    """
    _write(folder / "scores.csv", _SCORES, _score_rows(metrics))
    rows = [_sample_row(sample) for sample in metrics.get("samples", [])]
    names = list(dict.fromkeys(name for row in rows for name in row))
    _write(folder / "samples.csv", names, [[row.get(name) for name in names] for row in rows])


def _score_rows(metrics: Mapping[str, Any]) -> Iterator[list[Any]]:
    for key, content in metrics.get("scores", {}).items():
        score = Score.of(content)
        for arm, value in score.values.items():
            yield [key, arm, value.value, value.low, value.high, value.n, score.better]
        if score.change:
            change = score.change
            yield [key, "change", change.value, change.low, change.high, None, score.better]


def _sample_row(sample: Mapping[str, Any]) -> dict[str, Any]:
    width, height = sample.get("size") or (None, None)
    row = {name: sample.get(name) for name in ("prompt", "class_prompt", "seed")}
    row |= {"width": width, "height": height}
    row |= {f"{arm}_file": file for arm, file in sample.get("pictures", {}).items()}
    for key, by_arm in sample.get("scores", {}).items():
        row |= {f"{key}_{arm}": value for arm, value in by_arm.items()}
    for name in _NEAREST:
        nearest = sample.get(name) or {}
        row |= {name: nearest.get("id"), f"{name}_similarity": nearest.get("similarity")}
    return row


def _write(path: Path, names: Sequence[str], rows: Any) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([names, *rows])
    write_atomically(path, text.getvalue().encode("utf-8"))
