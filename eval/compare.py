"""Is one run, or one checkpoint, better than another, and how sure is that?

    python eval/compare.py runs='[runs/a, runs/b]'                # compare.json, compare.html
    python eval/compare.py runs=runs/a steps='[100, 400]'
    python eval/compare.py runs='[runs/a, runs/b]' rating=rating.html
    python eval/compare.py runs='[runs/a, runs/b]' rating=rating.html votes='[anna.json, ben.json]'

Of runs that eval/evaluate.py has evaluated alike: the pictures are paired by prompt and seed. The
first run is what the others are compared with. With rating= a page is written on which people judge
the pictures without knowing whose they are; votes= counts what they saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from train import screens
from train.config import Section, UserError, command, load


class CompareConfig(Section):
    """Compares evaluated runs, or checkpoints of one (eval/compare.py)."""

    runs: list[Path]
    """Directories of evaluated runs; the first is what the others are compared with."""
    steps: list[int] = []
    """Optimizer steps of one run that was evaluated during training; the first is what the others
    are compared with."""
    output: Path | None = None
    """Folder of compare.json and compare.html; default: compare-A-B beside the first run."""
    rating: Path | None = None
    """A page to write, FILE.html, on which people judge the pictures blindly. Whose is whose goes
    into FILE.key.json. With `votes`: the page they were saved from."""
    rating_kind: Literal["pair", "score"] = "pair"
    """Two pictures of a prompt to choose from, or one picture at a time to rate from 1 to 5."""
    rating_count: int = Field(40, ge=1)
    """Prompt and seed pairs on the page, from all prompts evenly."""
    question: str | None = None
    """What people are asked; default: which picture shows the prompt better."""
    votes: list[Path] = []
    """Files that people saved from the page, one each."""
    seed: int = 0
    """Of the order on the page and of the sides."""

    @field_validator("runs", "votes", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.steps and (len(self.runs) != 1 or len(set(self.steps)) < max(2, len(self.steps))):
            raise ValueError(f"steps={self.steps}: give one run and two different steps or more")
        if not self.steps and len({run.absolute() for run in self.runs}) < max(2, len(self.runs)):
            given = ", ".join(map(str, self.runs))
            raise ValueError(f"runs=[{given}]: give two different runs or more, or steps of one")
        if self.votes and self.rating is None:
            raise ValueError("votes: give rating=FILE.html too, the page they were saved from")
        if self.rating is not None and self.rating.suffix != ".html":
            raise ValueError(f"rating={self.rating}: the page's name ends in .html")
        sides = len(self.steps or self.runs)
        if self.rating is not None and not self.votes and self.rating_kind == "pair" and sides != 2:
            raise ValueError("rating_kind=pair is of two; use rating_kind=score for more")
        return self


def main(arguments: list[str]) -> None:
    config = load(CompareConfig, arguments)
    from eval import comparing, evaluated_runs

    if config.steps:
        sides = evaluated_runs.read_steps(config.runs[0], config.steps)
    else:
        sides = evaluated_runs.read_runs(config.runs)
    comparing.check(sides)
    if config.rating and not config.votes:
        _write_page(config, config.rating, sides)
        return
    from eval.comparison_report import Comparisons, console, write

    with screens.working("comparing"):
        tests = comparing.compare(sides)
    found = Comparisons(
        sides,
        tests,
        comparing.unpaired(sides, tests),
        comparing.notes(sides),
        _judged(config, config.rating, sides) if config.rating else {},
    )
    folder = config.output or _beside(config)
    with _writing(f"output={folder}"):
        page = write(found, folder)
    print(f"{console(found)}\n\n{page}")
    screens.done(page)


def _write_page(config: CompareConfig, file: Path, sides: list[Any]) -> None:
    from eval import rating_page

    with _writing(f"rating={file}"):
        key = rating_page.write(
            file,
            sides,
            kind=config.rating_kind,
            count=config.rating_count,
            question=config.question,
            seed=config.seed,
        )
    print(f"{file}\nwhose pictures are whose (not for those who vote): {key}")
    screens.done(file, key=key)


@contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written ({error.strerror or error}); name another place"
        ) from None


def _judged(config: CompareConfig, file: Path, sides: list[Any]) -> dict[str, Any]:
    from eval import rating_page, votes

    key = rating_page.read_key(file, sides)
    return votes.judgement(key, votes.read(config.votes, key))


def _beside(config: CompareConfig) -> Path:
    names = [f"step-{step}" for step in config.steps]
    names = names or [run.absolute().name for run in config.runs]
    folder = config.runs[0] / "eval" if config.steps else config.runs[0].absolute().parent
    # Names may be as long as names can be.
    name = "-".join(["compare", *names])[:120]
    return folder / name


if __name__ == "__main__":
    command(main)
