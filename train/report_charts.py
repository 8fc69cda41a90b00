"""The charts of a run's report: its log, the held-out loss and the scores of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from eval.charts import Chart, Curve, charts
from eval.in_training import said
from train import overfitting
from train.overfitting import Measured, Metric
from train.run_figures import smooth
from train.run_record import Run

_QUARTERS: tuple[tuple[Metric, str, Literal["q1", "q2", "q3", "q4"]], ...] = (
    ("loss_q1", "Least noise", "q1"),
    ("loss_q2", "Second", "q2"),
    ("loss_q3", "Third", "q3"),
    ("loss_q4", "Most noise", "q4"),
)
SCORES = {
    "fid": ("FID", "Fréchet distance, less is better"),
    "kid": ("KID", "kernel distance, less is better"),
    "cmmd": ("CMMD", "CLIP distance, less is better"),
    "clip_score": ("CLIP score", "likeness to the prompt, more is better"),
    "clip_t": ("CLIP-T", "likeness to the prompt without the subject's name, more is better"),
    "clip_i": ("CLIP-I", "likeness to real pictures, more is better"),
    "dino": ("DINO", "likeness to real pictures, more is better"),
}
"""Of pictures made in training: what each is called, and what it tells."""


def curves(run: Run) -> str:
    steps, loss, clip = run.steps, run.column("loss"), run.number("train.clip_norm")
    weighted = run.setting("diffusion.min_snr_gamma")
    limit = [Curve(f"Clipped above {clip:g}", [clip] * len(steps), "limit")] if clip else []

    def chart(title: str, unit: str, *curves: Curve, from_zero: bool = True) -> Chart:
        return Chart(title, unit, "optimizer steps", steps, curves, from_zero)

    drawn = [
        chart(
            "Loss",
            "mean squared error" + (", Min-SNR weighted" if weighted else ""),
            Curve("As logged", loss, "pale"),
            Curve("Smoothed", smooth(loss)),
            from_zero=False,
        ),
        *_held_out(run),
        chart("Learning rate", "learning rate", Curve("learning rate", run.column("lr"))),
        chart(
            "Gradient norm",
            "L2 norm before clipping",
            *limit,
            Curve("Gradient norm", run.column("grad_norm")),
        ),
        chart("Speed", "images per second", Curve("speed", run.column("images_per_second"))),
    ]
    return charts("Curves", "One point per logged line, or per validation.", drawn)


def _held_out(run: Run) -> list[Chart]:
    """The held-out loss with its standard error, and how each quarter of the schedule fares."""
    measured = run.validations
    if not measured:
        return []
    steps = [float(one.step) for one in measured]
    errors = [overfitting.standard_error(one.held_out.of_pictures("loss")) for one in measured]
    lowest = overfitting.lowest(measured, run.metric)
    by_loss = run.setting("validation.metric") not in SCORES
    best = (lowest.step if lowest else None) if by_loss else run.best
    mark = _mark(best, steps)
    first = measured[0]
    return [
        Chart(
            "Held-out loss",
            "mean over the schedule, less is better, ± standard error",
            "optimizer steps",
            steps,
            [
                Curve("Pictures trained on", [one.train.mean("loss") for one in measured], "pale"),
                Curve("Held-out pictures", [one.value("loss") for one in measured], spread=errors),
            ],
            from_zero=False,
            mark=mark,
        ),
        Chart(
            "Held-out loss by quarter of the schedule",
            f"% of that at step {first.step}, less is better",
            "optimizer steps",
            steps,
            [
                Curve(name, [100 * _ratio(one, first, quarter) for one in measured], look)
                for quarter, name, look in _QUARTERS
            ],
            from_zero=False,
            mark=mark,
        ),
    ]


def _ratio(measured: Measured, first: Measured, quarter: Metric) -> float:
    before = first.value(quarter)
    return measured.value(quarter) / before if before > 0 else math.nan


def scores(run: Run) -> str:
    """The scores of pictures made during training, one chart each."""
    found = run.examinations
    names = list(dict.fromkeys(name for one in found for name in one.scores))
    steps = [float(one.step) for one in found]
    drawn = []
    for name in names:
        title, meaning = SCORES.get(name, (name.replace("_", " "), "score"))
        curve = Curve(title, [one.value(name) for one in found])
        best = _mark(run.best, steps)
        drawn.append(
            Chart(title, meaning, "optimizer steps", steps, [curve], from_zero=False, mark=best)
        )
    counted = f"{said(found[-1].counts)}, of" if found and found[-1].counts else "Of"
    explanation = (
        f"{counted} the same prompts and seeds at every step; at step 0 those of the base."
    )
    return charts("Scores of generated pictures", explanation, drawn)


def _mark(best: int | None, steps: Sequence[float]) -> tuple[float, str] | None:
    """Where the best step is, on a chart that goes so far."""
    if best is None or best > max(steps):
        return None
    return float(best), f"Best: step {best:,}" if best else "Best: before training"
