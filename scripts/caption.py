"""Captions beside pictures, written by a model.

    accelerate launch scripts/caption.py source=my/pictures \
        model=Salesforce/blip-image-captioning-base
    accelerate launch scripts/caption.py source=my/pictures model=models/blip2 beams=3 \
        prompt="a photo of" prefix="a photo of "

Writes NAME.txt beside each picture that has no caption, or into texts/ where the captions are
there. A picture whose caption is empty has none; other captions are never touched, unless with
overwrite=true. The same command resumes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from PIL import Image
from pydantic import Field, model_validator

from data import beside
from data.captioner import Captioner, check_model
from data.captions import IMAGES, TEXTS, Pairs, Sidecars, recognise
from data.images import open_image
from data.listing import list_folder, shown, stem
from train import screens
from train.config import Section, UserError, command, load

if TYPE_CHECKING:
    import torch

LONGEST_SIDE = 1536  # pixels; models see far fewer, and a queue of large photos fills the memory


class CaptioningConfig(Section):
    """Captions beside pictures, written by a model (scripts/caption.py)."""

    source: Path
    """Folder of the pictures, with all folders in it."""
    model: str
    """An image-to-text model of transformers (BLIP, BLIP-2, GIT, ViT-GPT2, chat models that see,
    ...): a folder or a hub id. Only safetensors are loaded."""
    revision: str | None = None
    """Its hub revision (branch, tag or commit)."""
    prompt: str = ""
    """What the model goes on from, or is told to do; it does not become part of the caption.
    Default: nothing; for chat models, to describe the picture in one sentence."""
    prefix: str = ""
    """Put before what the model writes, as it stands (with its own space or comma)."""
    suffix: str = ""
    """Put after it."""
    extension: Literal[".txt", ".caption"] = ".txt"
    """Of the caption files."""
    overwrite: bool = False
    """Replace the captions that there are; the same command then starts anew, not where it was."""
    on_bad_image: Literal["report", "abort"] = "report"
    """What a picture that cannot be captioned does: be named at the end, or stop the command."""
    batch_size: int = Field(8, ge=1)
    """Pictures captioned at once, per process."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the model; `no` is fp32."""
    max_new_tokens: int = Field(50, ge=1)
    """Longest caption, in the model's tokens."""
    beams: int = Field(1, ge=1)
    """Beams of the search; 1 takes the likeliest token each time."""
    temperature: float = Field(0.0, ge=0)
    """Above 0, tokens are drawn at random at this temperature."""
    seed: int = Field(0, ge=0)
    """Of those draws, with the picture's name."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.temperature and self.beams > 1:
            raise ValueError(
                f"temperature={self.temperature} draws tokens and beams={self.beams} searches for "
                "the likeliest: leave one of them out"
            )
        return self


@dataclass
class Plan:
    """What is to be captioned."""

    files: dict[str, Path] = field(default_factory=dict)
    """Pictures that lack a caption, by id, sorted."""
    targets: dict[str, Path] = field(default_factory=dict)
    """Where their captions go."""
    kept: int = 0
    """Pictures that have a caption."""
    problems: dict[str, str] = field(default_factory=dict)
    """What cannot be captioned and why, by id."""
    notes: list[str] = field(default_factory=list)
    """What is odd in the folder."""


@dataclass
class Outcome:
    """What became of a process's share."""

    captioned: int = 0
    kept: int = 0
    silent: dict[str, str] = field(default_factory=dict)
    """Pictures about which the model wrote nothing."""
    problems: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str]) -> None:
    config = load(CaptioningConfig, arguments)
    check_model(config.model)
    plan = make_plan(config)
    if not plan.files:
        if os.environ.get("RANK", "0") == "0":
            summarise(plan, [])
        return

    from eval.processes import gather, join

    state = join()
    state.wait_for_everyone()  # all have listed what is missing before the first caption is written
    mine = list(plan.files)[state.process_index :: state.num_processes]
    with screens.working(f"loading {config.model}"):
        captioner = load_captioner(config, state.device)
    outcome = write_captions(captioner, plan, mine, config, show=state.is_main_process)
    outcomes = gather(outcome)
    if state.is_main_process:
        summarise(plan, outcomes)
    state.destroy_process_group()


def make_plan(config: CaptioningConfig) -> Plan:
    """Finds the pictures without a caption.

    Raises UserError where there are no pictures, where the folder's captions are in a metadata
    file, where it cannot be written to, and for problems if they are to stop the command.
    """
    if not config.source.is_dir():
        what = "is not a folder" if config.source.exists() else "does not exist"
        raise UserError(f"source={config.source} {what}: give the folder that holds the pictures")
    listing = list_folder(config.source)
    layout = recognise(listing, default="")
    if not isinstance(layout, Sidecars):
        raise UserError(
            f"source={config.source} holds a metadata file, so captions beside the pictures would "
            "not be read: move that file elsewhere, or write the captions into it"
        )
    plan = Plan(problems=dict(listing.problems), notes=list(listing.notes))
    owners: dict[Path, str] = {}
    for name in layout.pictures:
        try:
            target = _target(layout, name, config)
            if target is None:
                plan.kept += 1
                continue
            owner = owners.setdefault(target, name)
            if owner != name:
                raise ValueError(f"would share its caption with {shown(owner)}: rename one")
            plan.files[name], plan.targets[name] = Path(listing.path(name)), target
        except ValueError as error:
            plan.problems[name] = str(error)
    _stop_for(plan.problems, config)
    _check_writable(plan)
    return plan


def _target(layout: Sidecars, name: str, config: CaptioningConfig) -> Path | None:
    """Where the picture's caption goes; None if it has one. ValueError if it cannot go there."""
    texts = layout.texts(name)
    if texts:
        captions = layout.captions(name)
        # An empty file of either kind is filled: a second beside it would be one too many.
        return None if captions and not config.overwrite else Path(layout.listing.path(texts[0]))
    target = _new_target(layout, name, config.extension)
    if os.path.lexists(target):
        raise ValueError(f"{shown(target.name)} is in the way: remove it")
    if len(os.fsencode(target.name)) > beside.LONGEST_NAME:
        raise ValueError(f"its name is too long to have {config.extension} added: shorten it")
    return target


def _new_target(layout: Sidecars, name: str, extension: str) -> Path:
    listing = layout.listing
    if isinstance(layout, Pairs):
        folder = next(folder for folder in TEXTS if listing.starting(f"{folder}/"))
        return listing.folder / folder / (stem(name).removeprefix(f"{IMAGES}/") + extension)
    # Beside the picture as its name is spelled on the disk.
    return Path(stem(listing.path(name)) + extension)


def _check_writable(plan: Plan) -> None:
    for folder in {target.parent for target in plan.targets.values()}:
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"captions cannot be written to {folder}: give write permission there")


def _stop_for(problems: Mapping[str, str], config: CaptioningConfig) -> None:
    if problems and config.on_bad_image == "abort":
        raise UserError(
            f"source={config.source}: pictures that cannot be captioned, and "
            f"on_bad_image=abort:\n{beside.named(problems)}"
        )


def load_captioner(config: CaptioningConfig, device: torch.device) -> Captioner:
    """The model, without the libraries' remarks on loading."""
    from eval.processes import quieten
    from train.models import dtype_of

    quieten()
    dtype = dtype_of(config.precision)
    return Captioner.load(config.model, revision=config.revision, dtype=dtype, device=device)


def write_captions(
    captioner: Captioner,
    plan: Plan,
    names: Sequence[str],
    config: CaptioningConfig,
    *,
    show: bool = True,
) -> Outcome:
    """Captions these pictures, each file written whole as soon as its batch is done."""
    outcome = Outcome()
    files = {name: plan.files[name] for name in names}
    with _bar(len(files), show=show) as bar:
        for batch in beside.decoded(
            files,
            _read,
            batch_size=config.batch_size,
            problems=outcome.problems,
            progress=lambda done, total: bar.update(done - bar.n),
        ):
            _stop_for(outcome.problems, config)
            ids = [name for name, _ in batch]
            captions = captioner.caption(
                [image for _, image in batch],
                ids,
                prompt=config.prompt,
                max_new_tokens=config.max_new_tokens,
                beams=config.beams,
                temperature=config.temperature,
                seed=config.seed,
            )
            for name, caption in zip(ids, captions, strict=True):
                _write(caption, name, plan.targets[name], config, outcome)
        _stop_for(outcome.problems, config)
    return outcome


def _read(path: Path) -> Image.Image:
    # Half of it suffices: a JPEG is decoded to cover twice the size.
    half = LONGEST_SIDE // 2
    image = open_image(path, cover=(half, half))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def _write(
    caption: str, name: str, target: Path, config: CaptioningConfig, outcome: Outcome
) -> None:
    if not caption:
        outcome.silent[name] = "the model wrote nothing"
    elif not config.overwrite and _holds_text(target):
        outcome.kept += 1  # written by somebody else in the meantime
    else:
        text = " ".join(f"{config.prefix}{caption}{config.suffix}".split())
        beside.write(target, f"{text}\n".encode())
        outcome.captioned += 1


def _holds_text(target: Path) -> bool:
    try:
        return bool(target.read_bytes().strip())
    except FileNotFoundError:
        return False


def _bar(total: int, *, show: bool) -> Any:
    return screens.bar(total, "captions", unit="pictures", shown=show, leave=True)


def summarise(plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Prints what became of all pictures."""
    captioned = sum(outcome.captioned for outcome in outcomes)
    kept = plan.kept + sum(outcome.kept for outcome in outcomes)
    problems, silent = dict(plan.problems), dict[str, str]()
    for outcome in outcomes:
        problems |= outcome.problems
        silent |= outcome.silent
    for note in plan.notes:
        print(f"note: {note}")
    print(f"captions: {captioned} written, {kept} kept as they are")
    for what, lines in (("not captioned", problems), ("nothing to say about", silent)):
        if lines:
            print(f"{what} ({len(lines)}):\n{beside.named(lines)}")
    screens.done(captioned=captioned, kept=kept, problems=len(problems))


if __name__ == "__main__":
    command(main)
