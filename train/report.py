"""report.html of a run: curves, previews, dataset and configuration at a glance, opens offline.

Made from nothing but the run directory, so at any time and as often as wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from eval.charts import Chart, Curve, charts
from eval.figures import number
from eval.in_training import few, said
from eval.report import (
    Comparison,
    Panel,
    Section,
    facts,
    link,
    listing,
    section_of,
    verdict_line,
    warning,
    write_page,
)
from train import overfitting
from train.overfitting import Measured, Metric
from train.run_record import Run, read_json

_WAIT_LIMIT = 0.2  # share of the time spent waiting for data, above which a warning stands
_CLIPPED_LIMIT = 0.5  # share of logged lines above the clip norm, likewise
_QUARTERS: tuple[tuple[Metric, str, Literal["q1", "q2", "q3", "q4"]], ...] = (
    ("loss_q1", "least noise", "q1"),
    ("loss_q2", "second", "q2"),
    ("loss_q3", "third", "q3"),
    ("loss_q4", "most noise", "q4"),
)
_SCORES = {
    "fid": ("FID", "Fréchet distance, less is better"),
    "kid": ("KID", "kernel distance, less is better"),
    "cmmd": ("CMMD", "CLIP distance, less is better"),
    "clip_score": ("CLIP score", "likeness to the prompt, more is better"),
    "clip_t": ("CLIP-T", "likeness to the prompt without the subject's name, more is better"),
    "clip_i": ("CLIP-I", "likeness to real pictures, more is better"),
    "dino": ("DINO", "likeness to real pictures, more is better"),
}
_STEPS = 8  # that are named, of more
_PROMPTS, _TIMES = 12, 5  # previews shown: prompts, and steps of each, both evenly spread


def write(output: Path, *, dataset: Mapping[str, Any] | None = None) -> Path:
    """Writes OUTPUT/report.html, whole or not at all, and returns its path.

    dataset: facts about the training pictures beside those of the manifest. Reads config.yaml,
    manifest.json, metrics.jsonl, previews/ and eval/metrics.json; what is missing or torn is left
    out. Called by one process.
    """
    run = Run.read(output, dataset or {})
    path = output / "report.html"
    write_page(
        path,
        title=f"Training run {output.absolute().name}",
        pieces=[
            *map(warning, warnings(run)),
            verdict_line(verdict(run)),
            _curves(run),
            _scores(run),
            section_of(_previews(run)),
            facts("Dataset", _rows(run.dataset)),
            _configuration(run),
            facts("Environment", [*_rows(run.manifest), *_memory(run)]),
            _evaluation(run),
        ],
    )
    return path


def verdict(run: Run) -> str:
    """How far the run came, on what, how well and how fast, in one sentence."""
    if not run.lines:
        return "No step has been logged yet."
    final, (speed, wait) = smooth(run.column("loss"))[-1], pace(run)
    loss = number(final) if math.isfinite(final) else "not finite"
    return (
        f"{_progress(run)}; final loss {loss} (smoothed), {number(speed)} images/s, "
        f"{100 * wait:.1f} % of the time waiting for data."
    )


def warnings(run: Run) -> list[str]:
    """What is wrong with the run, as sentences with a remedy."""
    found = [_unexamined(run), _too_few(run)]
    if run.lines:
        found = [_left_out(run), _overfitted(run), _starved(run), _clipped(run), *found]
    return [sentence for sentence in found if sentence]


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
    steps, speeds = run.steps, run.column("images_per_second")
    counts = [done - before for before, done in zip([0.0, *steps], steps, strict=False)]
    timed = [
        (count, count / speed, wait if math.isfinite(wait) else 0.0)
        for count, speed, wait in zip(counts, speeds, run.column("data_wait_fraction"), strict=True)
        if speed > 0
    ]
    # As if every step had one image: the true number cancels in both results.
    seconds = sum(second for _, second, _ in timed)
    if not seconds:
        return 0.0, 0.0
    waited = sum(second * wait for _, second, wait in timed)
    return sum(count for count, _, _ in timed) / seconds, waited / seconds


def _progress(run: Run) -> str:
    done, planned = int(run.steps[-1]), run.setting("train.steps")
    if planned is None:
        return f"{done:,} steps"
    counted = f"{done:,} of {planned:,} steps{_seen(run)}"
    if done < planned:
        return f"Not finished: {counted}"
    chosen = "" if run.taken is None else f"; its weights are those of step {run.taken:,}, the best"
    return f"Finished: {counted}{chosen}"


def _seen(run: Run) -> str:
    # From the epochs: batches of a small bucket have fewer than batch_size images.
    pictures, epochs = run.dataset.get("pictures"), run.column("epoch")[-1]
    if not pictures or not math.isfinite(epochs):
        return ""
    images = round(epochs * pictures)
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
    steps = ", ".join(f"{step:,}" for step in _spread(list(run.unexamined), _STEPS))
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
    clip, norms = run.setting("train.clip_norm"), run.column("grad_norm")
    share = sum(norm > clip for norm in norms) / len(norms) if clip else 0.0
    if share <= _CLIPPED_LIMIT:
        return ""
    return (
        f"The gradient norm is above train.clip_norm={clip:g} at {100 * share:.0f} % of the logged "
        "lines, so clipping sets the length of most gradients: raise train.clip_norm, or lower "
        "optim.learning_rate if the loss is unsteady."
    )


def _curves(run: Run) -> str:
    steps, loss, clip = run.steps, run.column("loss"), run.setting("train.clip_norm")
    weighted = run.setting("diffusion.min_snr_gamma")
    limit = [Curve(f"clipped above {clip:g}", [clip] * len(steps), "limit")] if clip else []

    def chart(title: str, unit: str, *curves: Curve, from_zero: bool = True) -> Chart:
        return Chart(title, unit, "optimizer steps", steps, curves, from_zero)

    drawn = [
        chart(
            "Loss",
            "mean squared error" + (", Min-SNR weighted" if weighted else ""),
            Curve("as logged", loss, "pale"),
            Curve("smoothed", smooth(loss)),
            from_zero=False,
        ),
        *_held_out(run),
        chart("Learning rate", "learning rate", Curve("learning rate", run.column("lr"))),
        chart(
            "Gradient norm",
            "L2 norm before clipping",
            *limit,
            Curve("gradient norm", run.column("grad_norm")),
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
    by_loss = run.setting("validation.metric") not in _SCORES
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
                Curve("pictures trained on", [one.train.mean("loss") for one in measured], "pale"),
                Curve("held-out pictures", [one.value("loss") for one in measured], spread=errors),
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


def _scores(run: Run) -> str:
    """The scores of pictures made during training, one chart each."""
    found = run.examinations
    names = list(dict.fromkeys(name for one in found for name in one.scores))
    steps = [float(one.step) for one in found]
    drawn = [
        Chart(
            *_SCORES.get(name, (name.replace("_", " "), "score")),
            "optimizer steps",
            steps,
            [Curve(name.replace("_", " "), [one.value(name) for one in found])],
            from_zero=False,
            mark=_mark(run.best, steps),
        )
        for name in names
    ]
    counted = f"{said(found[-1].counts)}, of" if found and found[-1].counts else "Of"
    explanation = (
        f"{counted} the same prompts and seeds at every step; at step 0 those of the base."
    )
    return charts("Scores of generated pictures", explanation, drawn)


def _mark(best: int | None, steps: Sequence[float]) -> tuple[float, str] | None:
    """Where the best step is, on a chart that goes so far."""
    if best is None or best > max(steps):
        return None
    return float(best), f"best: step {best:,}" if best else "best: before training"


def _previews(run: Run) -> Section:
    folders = sorted(path for path in (run.folder / "previews").glob("step-*") if path.is_dir())
    named = [("base", run.folder / "previews" / "base")]
    taken = [path for path in folders if path.name == f"step-{run.taken or 0:08d}"]
    shown = sorted({*_spread(folders, _TIMES), *taken})
    named += [(_step_named(path, best=path in taken), path) for path in shown]
    prompts = list(enumerate(run.setting("preview.prompts") or []))
    rows = [
        Comparison(str(prompt), list(_panels(named, f"{k:02d}.png")))
        for k, prompt in _spread(prompts, _PROMPTS)
    ]
    return Section(
        "Previews",
        "The same prompt and the same noise, before training and in its course.",
        [row for row in rows if row.panels],
        film=True,
    )


def _step_named(folder: Path, *, best: bool) -> str:
    return f"step {folder.name[5:].lstrip('0')}{', the best' if best else ''}"


def _panels(named: Sequence[tuple[str, Path]], file: str) -> Iterator[Panel]:
    for label, folder in named:
        if _readable(folder / file):
            yield Panel(folder / file, label)


def _readable(picture: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(picture) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # missing, or torn by a kill
        return False
    return True


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    count = len(run.config.splitlines())
    return listing(
        "Configuration", f"config.yaml, {count} lines: --config repeats the run", run.config
    )


def _evaluation(run: Run) -> str:
    metrics = read_json(run.folder / "eval" / "metrics.json")
    said = str(metrics.get("verdict", ""))
    return link("Evaluation", said, "eval/report.html") if metrics else ""


def _memory(run: Run) -> list[tuple[str, str]]:
    peaks = [value for value in run.column("peak_memory_gib") if math.isfinite(value)]
    return [("peak memory", f"{max(peaks):.2f} GiB")] if peaks else []


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), _text(value)) for key, value in values.items()]


def _text(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {text}" for name, text in _rows(value))
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(v, Mapping) for v in value) else ", ").join(
            map(_text, value)
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    last = len(items) - 1
    return items if last < count else [items[k * last // (count - 1)] for k in range(count)]
