"""The first screen of a run: what trains on what, for how long, and where the results go."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from train import adapters, base_layers, demands, expectation, rundir, screens
from train.config import (
    DreamBoothRun,
    FullRun,
    LoraConfig,
    LoraRun,
    ModelConfig,
    RunConfig,
    TextualInversionRun,
    UserError,
)
from train.families import BaseModel
from train.flops import trains_text, trains_weights
from train.inspection import weight_files
from train.pictures import Pictures
from train.safetensors_file import read_header
from train.screens import Row, amount
from train.tracking import shown_on

SD21_UNET_NUMBERS = 865_910_724
_SOME = 3  # buckets or sources that are listed by themselves


def rows(
    config: RunConfig, base: BaseModel, found: Pictures, more: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """The screen, and what stands apart below it: notes and warnings.

    more: lines of whoever checked the run, each with a label and "note" for what stands apart.
    """
    added = [(line[: screens.LABEL].strip(), line[screens.LABEL :].strip()) for line in more]
    apart = [*found.notes, *demands.notes(config, base)]
    apart += [text for label, text in added if label == "note"]
    shown = [
        ("trains", trains(config)),
        ("base", f"{base.path} ({base.kind}): {base}"),
        ("data", data(found)),
        *(("found", part.source.recognised.partition(", as ")[0]) for part in found.parts),
        *(("source", share) for share in found.shares()),
        *((label, text) for label, text in added if label != "note"),
        ("steps", steps(config, found)),
        *(("goes on", text) for text in resumed(config)),
        ("update", update(config)),
        *(("expected", text) for text in expectation.of(config, found)),
        ("saves", saves(config)),
        ("output", output(config)),
    ]
    return shown, [f"note     {note}" for note in apart]


def method(config: RunConfig) -> str:
    """What kind of training this is, in words."""
    match config:
        case LoraRun():
            return "LoRA"
        case DreamBoothRun():
            return "DreamBooth"
        case TextualInversionRun():
            return "Textual inversion"
        case FullRun():
            return "Full fine-tuning"
    return type(config).__name__.removesuffix("Run")  # a method of somebody's own


def trains(config: RunConfig) -> str:
    """What trains, and how many of the UNet's parameters that is where it can be told."""
    lora: LoraConfig | None = getattr(config, "lora", None)
    total = unet_numbers(config.model)
    if trains_weights(config):
        text = " and of the text encoder" if trains_text(config) == "weights" else ""
        return f"every weight of the UNet{f' ({amount(total)})' if total else ''}{text}"
    parts = list(_words(config))
    if lora is None:
        return f"{parts[0]}; no weight of the base" if parts else "weights of its own"
    text = f" and rank {lora.text_encoder.rank} on the text encoder" if lora.text_encoder else ""
    parts.append(f"LoRA rank {lora.rank} on the UNet ({', '.join(lora.targets)}){text}")
    count = adapter_numbers(lora, config.model)
    of = f" of {amount(total)}" if total and lora.text_encoder is None else ""
    return " and ".join(parts) + (f": {amount(count)}{of} parameters" if count else "")


def _words(config: RunConfig) -> Iterator[str]:
    if isinstance(config, TextualInversionRun):
        count = len(config.textual_inversion.tokens)
        yield "1 new word" if count == 1 else f"{count} new words"


def adapter_numbers(lora: LoraConfig, model: ModelConfig) -> int | None:
    """How many parameters adapters have on this base; None where only loading it can tell."""
    layers = base_layers.of_base(model)
    return None if layers is None else adapters.numbers(lora, layers)


def unet_numbers(model: ModelConfig) -> int | None:
    """How many parameters the UNet has; None where only loading it can tell."""
    try:
        files = weight_files(Path(model.path), "unet") if Path(model.path).is_dir() else []
        stored = [entry.shape for file in files for entry in read_header(file).tensors.values()]
    except (UserError, OSError):
        return None
    if stored:
        return sum(prod(shape) for shape in stored)
    layers = base_layers.of_base(model)
    usual = base_layers.unet_layers(base_layers.SD21_UNET)
    return SD21_UNET_NUMBERS if layers is not None and layers["unet"] == usual else None


def data(found: Pictures) -> str:
    """How many pictures in which buckets."""
    if any(part.stream for part in found.parts):
        return found.summary()
    counts = found.bucket_counts()
    if len(counts) <= _SOME:
        listed = ": " + ", ".join(f"{size} ({count})" for size, count in counts.items())
    else:
        sizes = list(counts)
        listed = f" from {sizes[0]} to {sizes[-1]}"
    pictures = "1 picture" if len(found.records) == 1 else f"{len(found.records)} pictures"
    return f"{pictures} in {len(counts)} bucket{'s' if len(counts) > 1 else ''}{listed} px"


def steps(config: RunConfig, found: Pictures) -> str:
    """How many steps of how many pictures, and how these come together."""
    train, processes = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    share = -(-train.batch_size // processes)
    micro = train.micro_batch_size or share
    cut = f", {micro} at once" if micro < share else ""
    many = f" on {processes} processes" if processes > 1 else ""
    return f"{train.steps} steps of {train.batch_size} images{cut}{many}{_epochs(config, found)}"


def _epochs(config: RunConfig, found: Pictures) -> str:
    if not len(found.sizes):
        return ""  # of a stream no one knows yet
    order = found.order(seed=config.seed, batch_size=config.pictures_per_step)
    return f" ({order.epochs(config.train.steps):.3g} epochs of {order.batches_in(0)} steps)"


def resumed(config: RunConfig) -> list[str]:
    """From which step, if a run is there to go on with."""
    step = rundir.newest(config.output)
    return [] if step is None else [f"from the checkpoint of step {step}"]


def update(config: RunConfig) -> str:
    """Optimizer, rate and precision."""
    optim, train = config.optim, config.train
    stored = "" if train.quantize == "none" else f", frozen weights in {train.quantize}"
    again = ", gradient checkpointing" if train.gradient_checkpointing else ""
    return (
        f"{optim.name} at {optim.learning_rate:g} ({optim.schedule}), precision "
        f"{train.mixed_precision}{stored}{again}"
    )


def saves(config: RunConfig) -> str:
    """What is written in the course of training, and how often."""
    newest, preview = config.checkpoint.keep, config.preview
    kept = f"a checkpoint every {config.checkpoint.every} steps (the newest {newest})"
    if preview.every and preview.prompts:
        many = "1 preview" if len(preview.prompts) == 1 else f"{len(preview.prompts)} previews"
        kept += f", {many} every {preview.every}"
    return f"{kept}, and at the end"


def output(config: RunConfig) -> str:
    """Where it all goes."""
    boards = shown_on(config.tracking)
    if os.environ.get("WANDB_MODE") == "disabled" and "wandb" in boards:
        boards.remove("wandb")
    shown = f"; also on {' and '.join(boards)}, project {config.tracking.project}" if boards else ""
    return f"{config.output}{shown}"
