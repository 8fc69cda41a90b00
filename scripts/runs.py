"""Runs at a glance: a list of them, several side by side, and the report of one.

    python scripts/runs.py list                                  # all below runs/
    python scripts/runs.py list runs/sweep sort=held_out filter='[lora, lora.rank=16]'
    python scripts/runs.py list output=runs.html                 # the same as a page
    python scripts/runs.py list json=true
    python scripts/runs.py compare runs/a runs/b                 # and compare-a-b.html beside them
    python scripts/runs.py report runs/a                         # report.html anew, at any time

Each answers --help. Nothing is changed but the pages that are written, so all of it may be done
while runs are running.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import field_validator

from train import screens
from train.config import Section, UserError, command, load

S = TypeVar("S", bound=Section)


class ListConfig(Section):
    """The runs below a folder (scripts/runs.py list [ROOT])."""

    root: Path = Path("runs")
    """Where runs are looked for, three folders deep."""
    filter: list[str] = []
    """Parts of names, or key=value of configurations (lora.rank=16); runs must fit all of them."""
    sort: str = "ended"
    """name, state, method, base, steps, images, loss, held_out, speed, time, ended, or a score
    (fid, clip_score, ...); the best, newest or most come first."""
    reverse: bool = False
    """The other way round."""
    format: Literal["table", "json"] = "table"
    """JSON has every number; json=true is the same."""
    output: Path | None = None
    """A page to write as well, FILE.html."""

    @field_validator("filter", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        values = value if isinstance(value, list) else [value]
        return [str(each) for each in values]

    @field_validator("output")
    @classmethod
    def _page(cls, value: Path | None) -> Path | None:
        return _checked_page(value)


class CompareConfig(Section):
    """Runs side by side (scripts/runs.py compare RUN RUN ...): settings that differ, results,
    curves, last previews, and paired tests where they were evaluated alike."""

    runs: list[Path]
    """Two to eight run directories; the first is what the others are compared with."""
    output: Path | None = None
    """The page, FILE.html; default: compare-A-B.html beside the first run."""

    @field_validator("output")
    @classmethod
    def _page(cls, value: Path | None) -> Path | None:
        return _checked_page(value)


class ReportConfig(Section):
    """Writes RUN/report.html anew (scripts/runs.py report RUN), also of a run that is running, was
    interrupted or was killed."""

    run: Path
    """A run directory."""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print(__doc__)
        return
    task, *rest = arguments
    if task not in _TASKS:
        raise UserError(f"{task} is none of {', '.join(_TASKS)}; --help shows how they are called")
    _TASKS[task](rest)


def list_(arguments: list[str]) -> None:
    words = ["format=json" if word == "json=true" else word for word in arguments]
    config = _read(ListConfig, words, "root")
    from scripts import run_listing, run_tables

    runs, skipped = run_listing.summaries(
        config.root, wanted=config.filter, sort=config.sort, reverse=config.reverse
    )
    if config.output:
        with _writing(config.output):
            run_tables.write_list(
                config.output,
                runs,
                skipped,
                title=f"Runs in {config.root}",
                wanted=" and ".join(config.filter),
            )
    screens.done(config.output, **run_tables.as_json(runs, skipped))
    if config.format == "json":
        print(json.dumps(run_tables.as_json(runs, skipped), indent=2))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [run_tables.terminal(runs, width=width), ""] if runs else []
    said = run_tables.summed(runs) if runs else _none_in(config)
    lines += filter(None, [said, run_tables.passed_over(skipped)])
    print("\n".join([*lines, *([str(config.output)] if config.output else [])]))


def _none_in(config: ListConfig) -> str:
    if config.filter:
        return f"none of the runs in {config.root} fits {' and '.join(config.filter)}"
    return f"no runs in {config.root}"


def compare(arguments: list[str]) -> None:
    config = _read(CompareConfig, arguments, "runs")
    from scripts import run_comparison, run_comparison_page

    compared = run_comparison.Compared.read(config.runs)
    page = config.output or run_comparison.page_beside(config.runs)
    with _writing(page):
        run_comparison_page.write(compared, page)
    print(f"{run_comparison_page.text(compared)}\n\n{page}")
    screens.done(page)


def report(arguments: list[str]) -> None:
    config = _read(ReportConfig, arguments, "run")
    from scripts import run_listing
    from train import report as page
    from train.run_record import Run

    if not config.run.is_dir():
        raise UserError(f"run={config.run}: no such folder; give the output= of a training run")
    if run_listing.find(config.run)[0] != [config.run]:
        raise UserError(f"run={config.run} is no run directory: it holds no config.yaml")
    found = run_listing.summary(Run.read(config.run, {}, courses=False), "")
    state = found.state.name
    with _writing(config.run / "report.html"):
        path = page.write(config.run, state=state.capitalize())
    print(f"{found.state}\n{path}")
    screens.done(path, state=found.state.name)


_TASKS: dict[str, Callable[[list[str]], None]] = {
    "list": list_,
    "compare": compare,
    "report": report,
}


def _read(schema: type[S], arguments: Sequence[str], key: str) -> S:
    """The configuration; arguments that set none of its keys are of that key."""
    plain = [word for word in arguments if not word.startswith("-") and not _sets(schema, word)]
    if "--config" in arguments or not plain:
        return load(schema, arguments)
    if key != "runs" and len(plain) > 1:
        raise UserError(f"one {key} at a time: {plain[0]}, and not {plain[1]} too")
    value = json.dumps(plain) if key == "runs" else plain[0]
    return load(schema, [f"{key}={value}", *(word for word in arguments if word not in plain)])


def _sets(schema: type[Section], word: str) -> bool:
    """Whether it is key=value, be the key a mistyped one: a path may have a `=` in it too."""
    key, is_setting, _ = word.partition("=")
    is_path = "/" in key or Path(word).exists()
    return bool(is_setting) and (key in schema.model_fields or not is_path)


def _checked_page(path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".html":
        raise ValueError(f"{path}: the page's name ends in .html")
    return path


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); name another place, or free "
            "space"
        ) from None


if __name__ == "__main__":
    command(main)
