"""report.html of a run: verdict, pictures, curves, use, times, dataset and configuration at a
glance, in one file that opens offline.

Made from nothing but the run directory, so at any time and as often as wanted: also of a run that
is running or was killed (scripts/runs.py report RUN). Its charts are in train/report_charts.py, the
other pieces in train/report_pieces.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval import slider
from eval.figures import number
from eval.in_training import few
from eval.report import verdict_line, warning, write_page
from train import overfitting, report_charts, report_pieces
from train.report_pieces import spread
from train.run_figures import images_seen, pace, smooth
from train.run_record import Run, finite

_WAIT_LIMIT = 0.2  # share of the time spent waiting for data, above which a warning stands
_CLIPPED_LIMIT = 0.5  # share of logged lines above the clip norm, likewise
_STEPS = 8  # that are named, of more
FINISHED = "Finished"


def write(output: Path, *, dataset: Mapping[str, Any] | None = None, state: str = "") -> Path:
    """Writes OUTPUT/report.html, whole or not at all, and returns its path.

    dataset: facts about the training pictures beside those of the manifest. state: what became of
    the run, "Finished" or another word; of a run that writes its own report, "", its last line
    tells. Reads config.yaml, manifest.json, metrics.jsonl, previews/ and eval/metrics.json; what is
    missing or torn is left out. Called by one process.
    """
    run = Run.read(output, dataset or {})
    path = output / "report.html"
    write_page(
        path,
        title=f"Training run {output.absolute().name}",
        pieces=[
            *map(warning, warnings(run)),
            verdict_line(" ".join(filter(None, [verdict(run, state=state), learned(run)]))),
            report_pieces.previews(run),
            report_charts.curves(run),
            report_charts.scores(run),
            report_pieces.evaluation(run),
            report_pieces.use(run, finished=is_finished(run, state=state)),
            report_pieces.timings(run),
            report_pieces.dataset(run),
            report_pieces.configuration(run),
            report_pieces.environment(run),
        ],
        script=slider.SCRIPT,
    )
    return path


def is_finished(run: Run, *, state: str = "") -> bool:
    """Whether its result is there, or about to be: as `state` says, or its last planned step is
    logged."""
    if state:
        return state == FINISHED
    planned = run.number("train.steps")
    return bool(run.lines) and planned is not None and int(run.steps[-1]) >= planned


def verdict(run: Run, *, state: str = "") -> str:
    """How far the run came, on what, how well and how fast, in one sentence."""
    if not run.lines:
        return "No step has been logged yet."
    final, (speed, wait) = smooth(run.column("loss"))[-1], pace(run)
    loss = number(final) if math.isfinite(final) else "not finite"
    return (
        f"{_progress(run, state)}; final loss {loss} (smoothed), {number(speed)} images/s, "
        f"{100 * wait:.1f} % of the time waiting for data."
    )


def learned(run: Run) -> str:
    """How the held-out loss has changed, each picture compared with itself; "" where that is not
    known."""
    measured = run.validations
    if len(measured) < 2 or measured[0].step or not run.lines:
        return ""
    end = next((one for one in measured if one.step == run.taken), measured[-1])
    before = measured[0].held_out.of_pictures("loss")
    change = end.held_out.of_pictures("loss") - before
    amount, error = float(change.mean()), overfitting.standard_error(change)
    if not (math.isfinite(amount) and math.isfinite(error) and before.mean() > 0):
        return ""
    pictures = f"{len(before):,} held-out pictures"
    if abs(amount) <= overfitting.STANDARD_ERRORS * error:
        return f"On {pictures} the loss is about the base's: no sure difference."
    share = f"{100 * abs(amount) / before.mean():.1f} % {'below' if amount < 0 else 'above'}"
    now = end.held_out.mean("loss")
    return f"On {pictures} the loss at step {end.step:,}, {number(now)}, is {share} the base's."


def warnings(run: Run) -> list[str]:
    """What is wrong with the run, as sentences with a remedy."""
    found = [_unexamined(run), _too_few(run)]
    if run.lines:
        found = [_left_out(run), _overfitted(run), _starved(run), _clipped(run), *found]
    return [sentence for sentence in found if sentence]


def _progress(run: Run, state: str) -> str:
    done, planned = int(run.steps[-1]), run.number("train.steps")
    if planned is None:
        return f"{done:,} steps"
    counted = f"{done:,} of {planned:,} steps{_seen(run)}"
    if not is_finished(run, state=state):
        return f"{state or 'Not finished'}: {counted}"
    chosen = "" if run.taken is None else f"; its weights are those of step {run.taken:,}, the best"
    return f"{FINISHED}: {counted}{chosen}"


def _seen(run: Run) -> str:
    pictures, epochs = finite(run.dataset.get("pictures")), run.column("epoch")[-1]
    images = images_seen(run)
    if images is None or not pictures or not math.isfinite(epochs):
        return ""
    return f" on about {images:,} images ({epochs:.3g} passes over {pictures:,} pictures)"


def _left_out(run: Run) -> str:
    counted = [
        (step, count)
        for step, count in zip(run.steps, run.column("left_out"), strict=True)
        if count > 0
    ]
    if not counted:
        return ""
    return (
        f"Steps left out, as their loss or gradient was not finite: {counted[-1][1]:,.0f}, the "
        f"first by step {counted[0][0]:,.0f}. What the run printed names their samples: look at "
        "those; or lower optim.learning_rate, or use bf16 or no mixed precision where it is fp16."
    )


def _overfitted(run: Run) -> str:
    rise = overfitting.risen(run.validations, run.metric)
    return f"{str(rise)[0].upper()}{str(rise)[1:]}." if rise else ""


def _unexamined(run: Run) -> str:
    if not run.unexamined:
        return ""
    steps = ", ".join(f"{step:,}" for step in spread(list(run.unexamined), _STEPS))
    last = list(run.unexamined.values())[-1]
    return (
        f"The pictures of {len(run.unexamined):,} steps could not be made and scored ({steps}), "
        f"at last because of: {last}. None of these steps can be the best."
    )


def _too_few(run: Run) -> str:
    if not run.examinations:
        return ""
    last = run.examinations[-1]
    warning = few(run.setting("validation.metric"), last.counts)
    return f"{warning}." if warning else ""


def _starved(run: Run) -> str:
    _, wait = pace(run)
    if wait <= _WAIT_LIMIT:
        return ""
    return (
        f"{100 * wait:.0f} % of the time went into waiting for data: raise data.workers "
        f"({run.setting('data.workers')} now), or put data.cache on a faster disk."
    )


def _clipped(run: Run) -> str:
    clip, norms = run.number("train.clip_norm"), run.column("grad_norm")
    share = sum(norm > clip for norm in norms) / len(norms) if clip else 0.0
    if share <= _CLIPPED_LIMIT:
        return ""
    return (
        f"The gradient norm is above train.clip_norm={clip:g} at {100 * share:.0f} % of the logged "
        "lines, so clipping sets the length of most gradients: raise train.clip_norm, or lower "
        "optim.learning_rate if the loss is unsteady."
    )
