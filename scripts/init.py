"""Writes a configuration for pictures of one's own, with the reason beside every value.

    python scripts/init.py data=my/pictures
    python scripts/init.py data=my/dog method=dreambooth card=12 output=dog.yaml yes=true
    python scripts/init.py data=my/pictures base=toy          # at once, on the embedded toy model

It reads the pictures and looks for a card, asks a few questions where it is run in a terminal
(Enter takes what it proposes), and ends with the command that trains. Nothing is downloaded.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from scripts.initial import looking, writing
from scripts.initial.choosing import (
    AT_ONCE,
    Answers,
    Method,
    Setting,
    ladder,
    method_for,
    settings,
    validated_every,
)
from scripts.planning import SCHEMAS
from train import screens
from train.config import RunConfig, Section, UserError, command, load, validate

MARGIN = 0.9
"""Of a card's memory that a run may take by the planner: the rest is for what it does not foresee,
and for the desktop."""


class InitConfig(Section):
    """A configuration for pictures of one's own (scripts/init.py)."""

    data: str | None = None
    """The pictures: a folder, with or without captions, or a Hugging Face dataset on disk."""
    method: Literal["lora", "dreambooth", "textual_inversion", "full"] | None = None
    """What to train; default: DreamBooth for few pictures of one subject, else a LoRA."""
    base: str | None = None
    """The base: a folder, file or hub id; toy is the embedded one. Default: SD 2.1."""
    noun: str | None = None
    """What a subject is one of, like dog; default: from the folder's name."""
    card: float | Literal["auto", "none"] = Field("auto")
    """Memory of the card in GiB; auto looks for one; none is a CPU."""
    output: Path = Path("my.yaml")
    """The file to write."""
    yes: bool = False
    """Ask nothing, take what is proposed."""
    force: bool = False
    """Replace a file that is there."""


def main(arguments: list[str]) -> None:
    config = load(InitConfig, arguments)
    check_output(config)
    answers = look(config)
    run = list(settings(answers))
    chosen, taken = fitting(answers, run)
    everything = sorted([*run, *chosen], key=lambda one: order_of(run, one))
    text = writing.text([*head(answers, config.output)], everything)
    check(text, answers.method, config.output)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(text, encoding="utf-8")
    tell(answers, config.output, taken)


def check_output(config: InitConfig) -> None:
    """Raises UserError for a file that is there."""
    if config.output.exists() and not config.force:
        raise UserError(
            f"output={config.output} is there already: give another output=, or force=true to "
            "replace it"
        )


def look(config: InitConfig) -> Answers:
    """What there is, and what is wanted: given, asked for, or proposed."""
    asks = sys.stdin.isatty() and sys.stdout.isatty() and not config.yes
    path = config.data or (asks and ask("Where are the pictures?", "", "a folder")) or ""
    if not path:
        raise UserError("data is missing: give the folder of pictures, data=my/pictures")
    found = looking.pictures(path)
    screens.say(f"found    {found}")
    method, why = method_for(found)
    chosen = config.method or (ask_method(method, why) if asks else method)
    base = config.base or (ask("Base model?", looking.SD21, "or toy") if asks else None)
    card = looking.card() if config.card == "auto" else config.card
    if asks and config.card == "auto" and card is None:
        said = ask("GiB of the card that will train?", "none", "none found here; none is a CPU")
        card = None if said == "none" else number(said)
    noun = config.noun or looking.kind_of(path)
    if asks and not config.noun and chosen in ("dreambooth", "textual_inversion"):
        noun = ask("What do they show one of?", noun, "one word, like dog")
    name = re.sub(r"[^a-z0-9]+", "-", config.output.stem.lower()).strip("-") or "my"
    model = looking.base(base)
    held_out = looking.held_out(path)
    return Answers(found, model, chosen, noun, None if card == "none" else card, name, held_out)


def ask(question: str, proposed: str, why: str) -> str:
    """One question on the terminal."""
    try:
        said = input(f"{question} [{proposed}] ({why}) " if proposed else f"{question} ({why}) ")
    except EOFError:
        said = ""
    return said.strip() or proposed


def ask_method(proposed: Method, why: str) -> Method:
    while (
        said := ask("Method?", proposed, f"{why}; or one of {', '.join(SCHEMAS)}")
    ) not in SCHEMAS:
        screens.say(f"{said!r} is none of {', '.join(SCHEMAS)}")
    return cast(Method, said)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"card={text}: give GiB as a number, like card=12, or card=none") from None


def fitting(answers: Answers, run: list[Setting]) -> tuple[list[Setting], float | None]:
    """The quickest way that by the planner fits the card, or the smallest; and the GiB that it is
    to take, None where there is nothing to choose."""
    ways = ladder(answers)
    if len(ways) == 1:
        return ways[0], None
    peaks: dict[int, float] = {}
    first, last = 0, len(ways)  # the quickest that fits is one of these; `last` is none
    with screens.working("looking for what fits the card"):
        while first < last:
            middle = (first + last) // 2
            peaks[middle] = peak(answers, [*run, *ways[middle]])
            if peaks[middle] <= MARGIN * (answers.card or 0):
                last = middle
            else:
                first = middle + 1
    taken = min(first, len(ways) - 1)
    said = f"images at once: {peaks[taken]:.1f} of {answers.card:g} GiB, by the planner"
    way = [one._replace(why=said) if one.key == AT_ONCE else one for one in ways[taken]]
    return way, peaks[taken]


def peak(answers: Answers, everything: list[Setting]) -> float:
    """GiB that the run would take."""
    from scripts.planning import PlanConfig, plan, run_config

    config = run_config(answers.method, writing.values(everything))
    counted = PlanConfig(device="cuda", card=None, images=answers.pictures.count)
    return float(plan(counted, config)["peak_gib"])


def order_of(run: list[Setting], one: Setting) -> tuple[int, int]:
    """Keys of a section stand together, in the order in which sections came first."""
    sections = list(dict.fromkeys(each.key.partition(".")[0] for each in run))
    section = one.key.partition(".")[0]
    place = sections.index(section) if section in sections else len(sections)
    return place, next((k for k, each in enumerate(run) if each is one), len(run))


def head(answers: Answers, output: Path) -> Iterator[str]:
    yield f"{answers.pictures}."
    yield f"  {train_command(answers.method, output)}"
    if answers.pictures.twice:
        yield "Some pictures are there twice; scripts/prepare.py finds and removes such."
    if could_hold_out(answers):
        yield "Without held-out pictures nobody knows how good it is. To keep a tenth back:"
        yield f"  {prepare_command(answers.pictures.path, output)}"
        yield f"and add {prepared_keys(answers, output)}"


def could_hold_out(answers: Answers) -> bool:
    """Whether there are enough pictures to do without some, and none are held out yet."""
    many = answers.pictures.count >= 20 and answers.method in ("lora", "full")
    return many and answers.held_out is None


def prepared(output: Path) -> str:
    return f"prepared/{output.stem}"


def prepared_keys(answers: Answers, output: Path) -> str:
    """Where the two parts are then."""
    folder = prepared(output)
    keys = (f"data.path={folder}/train", f"evaluation.path={folder}/held-out")
    return shlex.join([*keys, f"validation.every={validated_every(answers)}"])


def prepare_command(path: str, output: Path) -> str:
    words = (f"source={path}", f"output={prepared(output)}", "held_out=0.1")
    return f"python scripts/prepare.py {shlex.join(words)}"


def train_command(method: str, output: Path) -> str:
    return f"accelerate launch train/{method}.py --config {shlex.quote(str(output))}"


def check(text: str, method: Method, output: Path) -> None:
    """Raises UserError for what a run would refuse."""
    import yaml

    values: dict[str, Any] = yaml.safe_load(text)
    schema: type[RunConfig] = SCHEMAS[method]
    validate(schema, values, where=str(output))


def tell(answers: Answers, output: Path, taken: float | None) -> None:
    for bad in answers.pictures.bad[:5]:
        screens.say(f"left out {bad}")
    if taken is not None and taken > MARGIN * (answers.card or 0):
        screens.warn(
            f"these are the smallest settings, and by the planner they take {taken:.1f} of "
            f"{answers.card:g} GiB: it may not fit"
        )
    train, rows = train_command(answers.method, output), []
    if answers.card is None and not answers.base.toy:
        screens.warn("no card was found, and on a CPU this base takes days: base=toy is to try")
    if could_hold_out(answers):
        why = "hold some pictures out, to know how good it is, and train on the rest:"
        rows = [("better", why), ("", prepare_command(answers.pictures.path, output))]
        rows += [("", f"{train} {prepared_keys(answers, output)}")]
    rows = [("Next", "look at it, then:"), ("", train), *rows]
    screens.screen(f"wrote {output}", rows)
    screens.done(output, method=answers.method, pictures=answers.pictures.count)


if __name__ == "__main__":
    command(main)
