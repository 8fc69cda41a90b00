"""Numbers that a run's log gives: smoothed losses, images per second, where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from train import timings
from train.run_record import Run

_ASIDE = {
    "startup": "Start-up and caching",
    "previews": "Previews",
    "validation": "Validation",
    "evaluation": "Scores of pictures",
    "checkpoints": "Checkpoints",
}
_REST = "Start-up, caching, previews, validation, scores and checkpoints"
_LEAST = 1.0  # seconds that are worth a line


class Spent(NamedTuple):
    """What a part of a run's time went into."""

    name: str
    seconds: float


def final_loss(run: Run) -> float | None:
    """The smoothed training loss at the end; None without a finite one."""
    values = [value for value in run.column("loss")[-100:] if math.isfinite(value)]
    window = min(max(5, len(run.lines) // 20), 100)
    return sum(values[-window:]) / len(values[-window:]) if values else None


def smooth(values: Sequence[float]) -> list[float]:
    """Means of the last values, a twentieth of all but 5 to 100 of them; nan stays nan."""
    window = min(max(5, len(values) // 20), 100)
    smoothed = []
    for end, value in enumerate(values, 1):
        recent = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        smoothed.append(sum(recent) / len(recent) if math.isfinite(value) else math.nan)
    return smoothed


def pace(run: Run) -> tuple[float, float]:
    """Images per second and the share of time spent waiting for data, over the whole run."""
    timed = _timed(run)
    seconds = sum(second for _, second, _ in timed)
    if not seconds:
        return 0.0, 0.0
    waited = sum(second * wait for _, second, wait in timed)
    return sum(count for count, _, _ in timed) / seconds, waited / seconds


def images_seen(run: Run) -> int | None:
    """How many pictures all steps together had; None where that cannot be known."""
    if not run.lines:
        return None
    pictures, epochs = run.dataset.get("pictures"), run.column("epoch")[-1]
    # From the epochs: batches of a small bucket have fewer than batch_size images.
    if isinstance(pictures, int) and pictures and math.isfinite(epochs):
        return round(epochs * pictures)
    batch = run.number("train.batch_size")
    return round(run.steps[-1] * batch) if batch is not None else None


def training_seconds(run: Run) -> float | None:
    """How long the optimizer steps took, waiting for data included."""
    images, (speed, _) = images_seen(run), pace(run)
    return images / speed if images is not None and speed else None


def time_spent(run: Run) -> list[Spent]:
    """Where the time went, as far as the log or the files' times tell; parts below a second are
    left out."""
    seconds = training_seconds(run)
    if seconds is None:
        return []
    waited = seconds * pace(run)[1]
    parts = [Spent("Training steps", seconds - waited), Spent("Waiting for data", waited)]
    aside = _recorded(run) or _unrecorded(run, seconds)
    return [part for part in [*parts, *aside] if part.seconds >= _LEAST or part is parts[0]]


def _timed(run: Run) -> list[tuple[float, float, float]]:
    """(images, seconds, share of them spent waiting) of every line with a speed; as if every step
    had one image, for the true number cancels in what is made of it."""
    steps, speeds = run.steps, run.column("images_per_second")
    counts = [done - before for before, done in zip([0.0, *steps], steps, strict=False)]
    return [
        (count, count / speed, wait if math.isfinite(wait) else 0.0)
        for count, speed, wait in zip(counts, speeds, run.column("data_wait_fraction"), strict=True)
        if speed > 0
    ]


def _recorded(run: Run) -> list[Spent]:
    return [
        Spent(_ASIDE.get(what, what), spent) for what, spent in timings.read(run.folder).items()
    ]


def _unrecorded(run: Run, training: float) -> list[Spent]:
    """Without timings.json what is left of the time between manifest.json and the last line, where
    nothing was resumed: each start writes the one anew."""
    folder = run.folder
    try:
        begun = (folder / "manifest.json").stat().st_mtime
        ended = (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return []
    if _oldest(folder) < begun or ended - begun < training:
        return []
    return [Spent(_REST, ended - begun - training)]


def _oldest(folder: Path) -> float:
    """When the first of what a run leaves behind was written."""
    found = [folder / "previews" / "base", *(folder / "validation").glob("step-00000000.json")]
    found += (folder / "checkpoints").glob("step-*")
    return min((path.stat().st_mtime for path in found if path.exists()), default=math.inf)
