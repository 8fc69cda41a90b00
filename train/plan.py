"""What a run will do, found out before anything heavy is loaded, and its start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train import models, pictures, rundir
from train.config import RunConfig
from train.models import BaseModel
from train.pictures import Pictures

if TYPE_CHECKING:
    from accelerate import Accelerator

_SLACK_BYTES = 64 * 2**20  # metrics, previews, reports


@dataclass(frozen=True)
class Plan:
    """The base and the pictures of a run that can be done."""

    base: BaseModel
    pictures: Pictures


def plan(config: RunConfig, *, result: str, trainable_bytes: int) -> Plan | None:
    """Checks model, pictures, run directory and space, and prints the plan.

    result: the folder the run ends in. trainable_bytes: fp32 size of what trains, for the space its
    checkpoints need. None where nothing is left to do: a dry run, or a run that is finished. Raises
    UserError for whatever would stop the run later.
    """
    base = models.inspect(config.model)
    found = pictures.find(config.data)
    finished = rundir.check(config, result=result)
    _check_space(config, found, trainable_bytes)
    _say(_describe(config, base, found))
    if finished:
        _say(
            f"{config.output} is finished: {config.output / result}. For more, choose another "
            "output="
        )
    elif config.dry_run:
        _say("dry run: everything checked, nothing trained")
    return None if finished or config.dry_run else Plan(base, found)


def start(config: RunConfig, planned: Plan) -> Accelerator:
    """The accelerator, and the run directory with its configuration and manifest."""
    from train.launch import open_accelerator

    accelerator = open_accelerator(config.train.mixed_precision)
    if accelerator.is_main_process:
        facts = {
            "base": planned.base.__dict__,
            "dataset": {
                "path": str(config.data.path),
                "pictures": len(planned.pictures.sizes),
                "sha256": planned.pictures.fingerprint,
            },
            "processes": accelerator.num_processes,
        }
        rundir.create(config, facts)
    accelerator.wait_for_everyone()
    return accelerator


def _check_space(config: RunConfig, found: Pictures, trainable_bytes: int) -> None:
    cached = pictures.latent_bytes(found, flip=config.data.flip)
    rundir.check_space(config.data.cache, cached, what="cached latents")
    # Parameters and Adam's two moments, the kept checkpoints and the one being written, and the
    # result.
    checkpoints = 3 * trainable_bytes * (config.checkpoint.keep + 1) + trainable_bytes
    rundir.check_space(config.output, checkpoints + _SLACK_BYTES, what="checkpoints")


def _describe(config: RunConfig, base: BaseModel, found: Pictures) -> str:
    train, optim = config.train, config.optim
    known = f", {base.prediction_type}" if base.prediction_type else ""
    return "\n".join(
        [
            f"base     {base.path} ({base.kind}{known})",
            f"data     {found.summary()}",
            *(f"note     {note}" for note in found.source.notes),
            f"train    {train.steps} steps of {train.batch_size} images, {optim.name} at "
            f"{optim.learning_rate:g} ({optim.schedule}), precision {train.mixed_precision}",
            f"output   {config.output}",
        ]
    )


def _say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)
