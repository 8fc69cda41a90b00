"""Runs side by side: which settings differ, what came of each, their curves and last previews.

Light: nothing here needs torch. What is paired is paired by eval/significance.py; where all have
been evaluated, their scores by eval/comparing.py, as eval/compare.py does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from eval.charts import MANY
from eval.figures import number, signed
from eval.significance import paired
from scripts.run_listing import Score, Summary, flat, is_run, summary
from train.config import UserError
from train.overfitting import Measured
from train.run_record import Run
from train.screens import duration

if TYPE_CHECKING:
    from eval.comparison_report import Comparisons

MOST = len(MANY)
"""Runs at once: as many as curves can be told apart."""
_MISSING = "–"
_OWN = {"output", "dry_run", "checkpoint.accept_changes"}  # settings that say nothing of a run
_CLEAR = 0.05


class Row(NamedTuple):
    """A name and what each run has, with small print."""

    name: str
    cells: Sequence[tuple[str, str]]


class Shared(NamedTuple):
    """A prompt and seed that all runs have drawn: pictures of the bases, one where all have the
    same, and of each run that of the weights it ends with; each with what it is called."""

    prompt: str
    seed: int
    bases: Sequence[tuple[str, Path]]
    pictures: Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class Compared:
    """Runs and what is known of each."""

    runs: Sequence[Run]
    names: Sequence[str]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Compared:
        """Raises UserError for what is no run, or too few or too many."""
        if not 2 <= len(folders) <= MOST:
            raise UserError(f"runs: give two to {MOST} runs, not {len(folders)}")
        places = [folder.resolve() for folder in folders]
        if twice := [folder for folder in folders if places.count(folder.resolve()) > 1]:
            raise UserError(f"runs: {twice[0]} is given more than once; give each run once")
        runs = []
        for folder in folders:
            run = Run.read(folder, {})
            if not is_run(run):
                raise UserError(f"runs: {folder} holds no config.yaml of a run")
            runs.append(run)
        names = [folder.absolute().name for folder in folders]
        several = len(set(names)) < len(names)
        return cls(runs, [str(folder) for folder in folders] if several else names)

    @property
    def title(self) -> str:
        return " against ".join(self.names)

    @cached_property
    def summaries(self) -> list[Summary]:
        return [summary(run, name) for run, name in zip(self.runs, self.names, strict=True)]

    @cached_property
    def evaluated(self) -> tuple[Comparisons | None, str]:
        """Paired tests of all scores, or why there are none."""
        from eval import comparing, evaluated_runs
        from eval.comparison_report import Comparisons

        try:
            sides = evaluated_runs.read_runs([run.folder for run in self.runs])
            comparing.check(sides)
        except UserError as error:
            return None, str(error)
        tests = comparing.compare(sides)
        rest = comparing.unpaired(sides, tests)
        return Comparisons(sides, tests, rest, comparing.notes(sides)), ""


def differing(compared: Compared) -> list[Row]:
    """The settings, pictures and surroundings that are not the same in all."""
    all_flat = [_known(run) for run in compared.runs]
    keys = dict.fromkeys(key for one in all_flat for key in one if key not in _OWN)
    rows = []
    for key in keys:
        said = [_said(one[key]) if key in one else _MISSING for one in all_flat]
        if len(set(said)) > 1:
            rows.append(Row(key, [(text, "") for text in said]))
    return rows


def results(compared: Compared) -> list[Row]:
    """What came of each run; rows in which none has anything are left out."""
    found = compared.summaries
    rows = [
        Row("State", [(one.state.name, one.state.detail) for one in found]),
        Row("Steps", [(f"{one.done:,}", _of_planned(one)) for one in found]),
        Row("Images seen", [(f"{one.images:,}" if one.images else "", "") for one in found]),
        Row("Training loss, smoothed", [(_number(one.loss), "") for one in found]),
        Row("Best held-out loss (less is better)", [_held_out(one) for one in found]),
        Row("Images per second", [(_number(one.speed), "") for one in found]),
        Row("Training time", [(duration(one.seconds) if one.seconds else "", "") for one in found]),
        Row("Peak memory", [(_peak(run), "") for run in compared.runs]),
    ]
    return [row for row in rows if any(text for text, _ in row.cells)]


def scores(compared: Compared) -> list[Row]:
    """Each score of the evaluations with its interval."""
    found = [one.scores for one in compared.summaries]
    rows = []
    for name in dict.fromkeys(name for one in found for name in one):
        known: Score = next(one[name] for one in found if name in one)
        better = f" ({known.better} is better)" if known.better else ""
        rows.append(Row(f"{known.title}{better}", [_scored(one.get(name)) for one in found]))
    return rows


def held_out_differences(compared: Compared) -> list[str]:
    """A sentence on each run but the first: its held-out loss at the end less the first's, picture
    by picture; none where they were not measured alike."""
    first, *others = zip(compared.names, compared.runs, strict=True)
    said = (_difference(*first, *other) for other in others)
    return [sentence for sentence in said if sentence]


def verdict(compared: Compared) -> str:
    """What differs clearly."""
    from eval.comparison_report import verdict as judged

    found, _ = compared.evaluated
    parts = [judged(found)] if found else []
    parts += held_out_differences(compared)
    if parts:
        return " ".join(parts)
    return (
        "Nothing here tells which run is better: neither the same held-out pictures nor "
        "evaluations made alike."
    )


def shared_previews(compared: Compared) -> list[Shared]:
    """The pictures at the end of the prompts and seeds that all runs have drawn."""
    shown = [_shown_previews(run) for run in compared.runs]
    drawn = [_previews_in(run, folder) for run, folder in zip(compared.runs, shown, strict=True)]
    steps = ["" if folder is None else f", step {_step(folder)}" for folder in shown]
    labels = [f"{name}{step}" for name, step in zip(compared.names, steps, strict=True)]
    rows = []
    for key in drawn[0]:
        if all(key in one for one in drawn):
            pictures = [one[key] for one in drawn]
            bases = _bases(compared, pictures)
            rows.append(Shared(*key, bases, list(zip(labels, pictures, strict=True))))
    return rows


def have_the_same_noise(compared: Compared) -> bool:
    """Whether a prompt's seed gives all runs the same noise: it has the size of the picture."""
    return len({_setting_of_noise(run) for run in compared.runs}) == 1


def _known(run: Run) -> dict[str, Any]:
    """Settings, and of the manifest what may explain a difference."""
    manifest, found = run.manifest, flat(run.settings)
    base = manifest.get("base")
    weights = base.get("sha256") if isinstance(base, dict) else None
    packages = manifest.get("packages")
    found |= {"(pictures, by content)": run.dataset.get("sha256")}
    found |= {"(base weights)": weights.get("unet") if isinstance(weights, dict) else None}
    found |= {"(torch)": packages.get("torch") if isinstance(packages, dict) else None}
    revision, mark, changed = str(manifest.get("git_revision")).partition("-")
    found["(git revision)"] = f"{revision[:12]}{mark}{changed}"
    for name in ("gpus", "processes"):
        found[f"({name})"] = manifest.get(name)
    return found


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _of_planned(one: Summary) -> str:
    return f"of {one.planned:,}" if one.planned not in (None, one.done) else ""


def _held_out(one: Summary) -> tuple[str, str]:
    if one.held_out is None:
        return "", ""
    error = f"± {number(one.held_out_error)}, " if one.held_out_error is not None else ""
    return number(one.held_out), f"{error}step {one.held_out_step:,}"


def _scored(score: Score | None) -> tuple[str, str]:
    if score is None:
        return "", ""
    known = score.low is not None and score.high is not None
    ends = f"{number(score.low or 0.0)} to {number(score.high or 0.0)}" if known else ""
    return number(score.value), ends


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _peak(run: Run) -> str:
    peaks = [value for value in run.column("peak_memory_gib") if math.isfinite(value)]
    return f"{max(peaks):.2f} GiB" if peaks else ""


def _end(run: Run) -> Measured | None:
    """The validation of the weights that the run ends with."""
    taken = next((one for one in run.validations if one.step == run.taken), None)
    return taken or (run.validations[-1] if run.validations else None)


def _difference(first: str, one: Run, second: str, other: Run) -> str:
    before, after = _end(one), _end(other)
    if before is None or after is None or not before.held_out.same_as(after.held_out):
        return ""
    if _objective(one) != _objective(other):
        return f"{second} and {first} have other objectives: their losses cannot be compared."
    losses = [end.held_out.of_pictures("loss") for end in (before, after)]
    if not all(map(math.isfinite, [*losses[0], *losses[1]])):
        return ""
    change = paired(losses[0], losses[1])
    ends = ""
    if change.low is not None and change.high is not None:
        ends = f", 95 % interval {signed(change.low)} to {signed(change.high)}"
    detail = f"{signed(change.difference)}{ends}, paired over {change.groups:,} pictures"
    if change.p > _CLEAR:
        return f"The held-out losses of {second} and {first} do not differ clearly ({detail})."
    way = "lower" if change.difference < 0 else "higher"
    return f"The held-out loss of {second} is {way} than that of {first} ({detail})."


def _objective(run: Run) -> tuple[Any, ...]:
    base = run.manifest.get("base")
    predicts = base.get("prediction_type") if isinstance(base, dict) else None
    return run.setting("diffusion"), predicts


def _shown_previews(run: Run) -> Path | None:
    """The folder of the previews of the step whose weights the run ends with, or of the last."""
    folders = sorted(path for path in (run.folder / "previews").glob("step-*") if path.is_dir())
    taken = [path for path in folders if path.name == f"step-{run.taken or 0:08d}"]
    found = taken or folders
    return found[-1] if found else None


def _previews_in(run: Run, folder: Path | None) -> dict[tuple[str, int], Path]:
    prompts, seed = run.setting("preview.prompts"), run.setting("preview.seed")
    if folder is None or not isinstance(prompts, list):
        return {}
    first = seed if isinstance(seed, int) else 0
    files = {(str(p), first + k): folder / f"{k:02d}.png" for k, p in enumerate(prompts)}
    return {key: file for key, file in files.items() if file.is_file()}


def _step(folder: Path) -> str:
    number = folder.name.removeprefix("step-")
    return f"{int(number):,}" if number.isdecimal() else number


def _bases(compared: Compared, pictures: Sequence[Path]) -> list[tuple[str, Path]]:
    """Beside these pictures, that of the base; of each run's own where they are not alike."""
    files = [
        run.folder / "previews" / "base" / picture.name
        for run, picture in zip(compared.runs, pictures, strict=True)
    ]
    if len({_drawn_from(run) for run in compared.runs}) == 1:
        found = [("base", file) for file in files if file.is_file()]
        return found[:1]
    named = zip(compared.names, files, strict=True)
    return [(f"base of {name}", file) for name, file in named if file.is_file()]


def _drawn_from(run: Run) -> str:
    """What decides how a base's picture of a prompt and seed looks."""
    base = run.manifest.get("base")
    weights = base.get("sha256") if isinstance(base, dict) else None
    how = {key: run.setting(f"preview.{key}") for key in ("steps", "guidance", "images")}
    diffusion = [
        run.setting(f"diffusion.{key}") for key in ("prediction_type", "zero_terminal_snr")
    ]
    return repr((weights or run.setting("model.path"), how, _setting_of_noise(run), diffusion))


def _setting_of_noise(run: Run) -> str:
    return repr(run.setting("preview.resolution"))


def page_beside(folders: Sequence[Path]) -> Path:
    """compare-A-B.html beside the first run."""
    names = "-".join(folder.absolute().name for folder in folders)
    return folders[0].absolute().parent / f"compare-{names[:120]}.html"
