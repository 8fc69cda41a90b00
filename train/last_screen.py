"""The last screen of a run: what came of it, how to use it, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import rundir, screens, using
from train.config import RunConfig
from train.first_screen import method
from train.run_record import Run
from train.screens import Row, duration


def finished(config: RunConfig, result: str, *, seconds: float | None = None) -> None:
    """Shows a run whose result is there. seconds: that this process took; None where it did
    nothing, as the run was finished before."""
    folder, run = config.output / result, Run.read(config.output, {}, courses=False)
    title = f"{method(config)} finished: {folder}"
    screens.screen(title, [*_outcome(run, folder, seconds), *use(run)])
    screens.done(folder, **facts(run))


def stopped(config: RunConfig, step: int | None) -> None:
    """Shows a run that was asked to end: that it goes on, and how."""
    kept = f"the checkpoint of step {step} of {config.train.steps}" if step else "no checkpoint yet"
    again = using.continued(Run.read(config.output, {}, courses=False))
    rows = [("kept", kept), ("go on", f"the same command{', or:' if again else ''}")]
    rows += [("", again.lines)] if again else []
    screens.screen(f"{method(config)} stopped before its end: {config.output}", rows)
    screens.event("stopped", output=config.output, step=step)


def failed(config: RunConfig) -> None:
    """Shows where to look after a run that could not go on; its error follows."""
    step = rundir.newest(config.output)
    goes_on = f"the same command, from step {step}" if step else "the same command, from the start"
    rows = [("log", str(config.output / "metrics.jsonl")), ("go on", f"{goes_on}, once mended")]
    screens.screen(f"{method(config)} failed: {config.output}", rows)
    screens.event("failed", output=config.output, step=step)


def facts(run: Run) -> dict[str, Any]:
    """The last loss and the last held-out loss, as far as there are any."""
    losses, held_out = _of(run.lines, "loss"), _of(run.asides, "validation/loss")
    last = {"loss": losses[-1][1] if losses else None}
    return last | ({"held_out_loss": held_out[-1][1]} if held_out else {})


def _of(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), float)]


def _outcome(run: Run, folder: Path, seconds: float | None) -> Iterator[Row]:
    size = sum(map(rundir.size, folder.rglob("*")))
    yield "result", f"{folder} ({screens.size(size)})"
    if loss := _loss(run):
        yield "loss", loss
    speeds = sorted(speed for _, speed in _of(run.lines, "images_per_second"))
    rate = f"{speeds[len(speeds) // 2]:.3g} images/s while training" if speeds else ""
    took = "" if seconds is None else f"{duration(seconds)} from start to end"
    if took or rate:
        yield "took" if took else "speed", ", ".join(filter(None, [took, rate]))
    report = run.folder / "report.html"
    if report.is_file():
        yield "report", str(report)


def _loss(run: Run) -> str:
    """The held-out loss where there is one: the loss of single steps says little."""
    points = _of(run.asides, "validation/loss")
    if not points:
        losses = [loss for _, loss in _of(run.lines, "loss")]
        many = min(len(losses), 10)
        if not losses:
            return ""
        mean = sum(losses[-many:]) / many
        return f"{mean:.4f} on the pictures trained on; hold some out to know more"
    (first, before), (step, last) = points[0], points[-1]
    best = min(points, key=lambda point: point[1])
    since = f" ({before:.4f} at step {first})" if len(points) > 1 else ""
    least = f"; least {best[1]:.4f} at step {best[0]}" if best[0] != step else ""
    return f"held-out {last:.4f} at step {step}{since}{least}; less is better"


def use(run: Run) -> Iterator[Row]:
    """How to use the result in three tools, and the next command; all to be copied as it stands."""
    for label, way in zip(("Use it", "", ""), using.ways(run), strict=False):
        yield "", ""
        yield from _shown(label, way)
    yield "", ""
    yield from _shown("Next", using.measured(run))


def _shown(label: str, way: using.Way) -> Iterator[Row]:
    yield label, f"{way.title}:"
    yield from (("", line) for line in way.lines.splitlines() if line)
    if way.note:
        yield "", way.note
