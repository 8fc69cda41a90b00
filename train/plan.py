"""What a run will do, found out before anything heavy is loaded, and its start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.checks import token_counter
from data.listing import few
from train import (
    changes,
    demands,
    first_screen,
    last_screen,
    models,
    pictures,
    run_lock,
    rundir,
    screens,
    stopping,
    validation_data,
)
from train.changes import Change
from train.config import FullRun, RunConfig, TextualInversionRun, UserError
from train.models import BaseModel
from train.packages import require_deepspeed, require_optimizer, require_trackers
from train.pictures import Pictures
from train.tracking import shown_on

if TYPE_CHECKING:
    from accelerate import Accelerator

    from eval.in_training import Scoring
    from train.method import Pipeline

_HASHED = ("unet", "vae", "text_encoder")
_SHARDED_OPTIMIZERS = ("adamw", "schedule_free")  # the others' states are not like the weights
_DEEPSPEED = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("2", "3"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none",),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": ("false",),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none",),
}
_SLACK_BYTES = 64 * 2**20  # metrics, previews, reports


@dataclass(frozen=True)
class Plan:
    """The base and the pictures of a run that can be done, and whose run directory is locked."""

    base: BaseModel
    pictures: Pictures
    scoring: Scoring | None
    """The pictures that are made and scored during training."""
    dataset: Mapping[str, Any]
    """What the manifest says of the pictures."""
    changed: Sequence[Change]
    """What differs from the run that is resumed."""
    lock: ExitStack
    """Of the run directory; to be closed when the run ends."""
    result: str
    """The folder of the run directory that it ends in."""
    began: float
    """When the plan was begun, by `time.monotonic`."""


def plan(
    config: RunConfig,
    *,
    result: str,
    trainable_bytes: int | None = None,
    check: Callable[[Pictures], list[str] | None] = lambda found: None,
    dataset: Callable[[Pictures], Mapping[str, Any]] = lambda found: {},
) -> Plan | None:
    """Checks model, pictures, run directory and space, and shows the first screen.

    result: the folder the run ends in. trainable_bytes: fp32 size of what trains, for the space its
    checkpoints need; by default all of the base. check: raises UserError for what the method cannot
    train on, and returns lines to add to the plan, if any. dataset: what the manifest says of the
    pictures besides, or instead. None where nothing is left to do: a dry run, or a run that is
    finished. Raises UserError for whatever would stop the run later, where another run has the run
    directory, and where it holds one that was begun otherwise (train/changes.py).
    """
    began = time.monotonic()
    require_optimizer(config.optim.name)
    require_trackers(shown_on(config.tracking))
    _check_launcher(config)
    _check_output(config)
    base = models.inspect(config.model)
    demands.check_settings(config, base)
    finished = rundir.check(config, result=result)
    with ExitStack() as lock:
        writes = screens.is_first() and not (finished or config.dry_run)
        if writes:
            lock.enter_context(run_lock.locked(config.output))
        bad = config.output / "quarantine" if writes else None
        found = pictures.find(config.data, quarantined=bad)
        more = check(found) or []
        facts = _dataset(found) | dict(dataset(found))
        changed = changes.since(config, base, facts)
        if not finished:
            _check_space(config, base, found, trainable_bytes or models.fp32_bytes(base))
        held_out = [] if finished else _check_held_out(config, found)
        scoring = None if finished else _scoring(config, found)
        scored = scoring.describe() if scoring else []
        if not finished:
            _show(config, base, found, [*held_out, *scored, *more, *_notes(changed)])
        if config.dry_run:
            _say_long_captions(found)
        if finished:
            screens.say(f"{config.output} is finished. For more, choose another output=\n")
            last_screen.finished(config, result)
        elif config.dry_run:
            screens.say("dry run: everything checked, nothing trained")
        if finished or config.dry_run:
            return None
        return Plan(base, found, scoring, facts, changed, lock.pop_all(), result, began)


def _show(config: RunConfig, base: BaseModel, found: Pictures, more: Sequence[str]) -> None:
    """The first screen, with what is to be looked at apart from it."""
    if not screens.is_first():
        return
    # What a dry run says is all that it does; a run goes on though nobody hears it.
    with nullcontext() if config.dry_run else screens.unheard():
        _say(config, base, found, more)


def _say(config: RunConfig, base: BaseModel, found: Pictures, more: Sequence[str]) -> None:
    title = f"{first_screen.method(config)}: {config.output}"
    rows, notes = first_screen.rows(config, base, found, more)
    screens.screen(title, rows)
    if notes:
        screens.say("\n".join(["", *notes, ""]))
    facts = {"method": first_screen.method(config), "output": config.output}
    steps = {"steps": config.train.steps, "pictures": len(found.records)}
    screens.event("plan", **facts, **steps, screen=[list(row) for row in rows], notes=notes)


@contextmanager
def start(config: RunConfig, planned: Plan) -> Iterator[tuple[Accelerator, Pipeline]]:
    """The accelerator and the frozen base of a run, which lasts as long as the context: within it
    the run directory is locked, has its configuration and manifest, and signals are listened to.

    Raises UserError where a run that is to be resumed had another base.
    """
    from eval.processes import quieten
    from train import compiling
    from train.launch import open_accelerator

    with (
        screens.unheard(),
        planned.lock,
        _ending(config, planned),
        stopping.listening(config.output),
    ):
        quieten()
        accelerator = open_accelerator(config.train.mixed_precision, tf32=config.train.tf32)
        compiling.check(config.train.compile, accelerator.device.type)
        with screens.working(f"loading {config.model.path}"):
            pipeline = models.load_base(config, accelerator)
        if pipeline.scheduler.config.prediction_type != planned.base.prediction_type:
            screens.say(f"predicts {pipeline.scheduler.config.prediction_type}, as is asked for")
        with screens.working("hashing its weights"):
            hashes = {part: models.fingerprint(getattr(pipeline, part)) for part in _HASHED}
        loaded = changes.since_loaded(config, hashes)
        for note in _notes(loaded):
            screens.say(note)
        manifest = {
            "base": asdict(planned.base) | {"family": planned.base.family.name, "sha256": hashes},
            "dataset": planned.dataset,
            "processes": accelerator.num_processes,
        }
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            agreed = [str(c) for c in (*planned.changed, *loaded) if not c.is_harmless]
            rundir.create(config, manifest, changes=agreed)
        yield accelerator, pipeline


@contextmanager
def _ending(config: RunConfig, planned: Plan) -> Iterator[None]:
    """Shows how a run ended, in each of the three ways in which it can."""
    try:
        yield
    except stopping.Interrupted as interrupted:
        with suppress(OSError):  # the terminal is closed
            last_screen.stopped(config, interrupted.step)
        raise
    except UserError:  # the run is as it was
        raise
    except Exception as error:
        if screens.is_first() and (config.output / "config.yaml").exists():
            with suppress(OSError):  # the disk may be what is full
                rundir.fail(config.output, error)
                last_screen.failed(config)
        raise
    if not screens.is_first():
        return
    with suppress(OSError):  # the result is there all the same
        last_screen.finished(config, planned.result, seconds=time.monotonic() - planned.began)


def _notes(changed: Sequence[Change]) -> list[str]:
    return [f"note     goes on with another {change}" for change in changed]


def _dataset(found: Pictures) -> dict[str, Any]:
    one = len(found.parts) == 1
    return {
        "sources": [
            {
                "name": part.settings.name,
                "path": part.settings.path,
                "pictures": len(part.sizes),
                "sha256": found.fingerprint if one else Pictures([part]).fingerprint,
            }
            for part in found.parts
        ],
        "pictures": len(found.records),
        "left_out": len(found.rejected),
        "buckets": found.bucket_counts(),
        **found.account(),
        "recognised": found.recognised,
        "sha256": found.fingerprint,
    }


def _check_space(config: RunConfig, base: BaseModel, found: Pictures, trainable_bytes: int) -> None:
    """A run that is resumed has cached what it needs, and has some of its checkpoints."""
    kept, cached = rundir.checkpoint_bytes(config.output), 0
    if not kept:
        inpainting = base.family.inpainting
        cached = pictures.cache_bytes(found, config=config.data, inpainting=inpainting)
        # Perhaps of other pictures, but better too little asked for than a run refused.
        there = sum(map(rundir.size, (config.data.cache / "shards").glob("*")))
        cached = max(cached - there, 0)
        rundir.check_space(config.data.cache, cached, what="cached latents and captions")
    # Parameters, Adam's two moments and the average; the result.
    one = max(kept, default=trainable_bytes * (3 + (config.train.ema_decay is not None)))
    # The newest, the one being written, and the best.
    chosen = config.validation.score is not None or validation_data.settings(config) is not None
    count = max(config.checkpoint.keep + 1 + chosen - len(kept), 1)
    needed = count * one + trainable_bytes + _SLACK_BYTES
    if rundir.are_on_one_disk(config.data.cache, config.output):
        needed += cached
    rundir.check_space(config.output, needed, what="checkpoints")


def _check_launcher(config: RunConfig) -> None:
    """What `accelerate launch` was told, as its processes see it."""
    if _launched_with("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(config)
    if not _launched_with("ACCELERATE_USE_FSDP"):
        return
    if not isinstance(config, FullRun):
        raise UserError(
            "FSDP is for full fine-tuning (train/full.py): launch this with --config_file "
            "configs/accelerate/multi_gpu.yaml"
        )
    if os.environ.get("FSDP_VERSION", "1") != "2" or _launched_with(
        "FSDP_CPU_RAM_EFFICIENT_LOADING"
    ):
        raise UserError(
            "FSDP works here with fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false: "
            "launch with --config_file configs/accelerate/fsdp.yaml"
        )
    if config.optim.name not in _SHARDED_OPTIMIZERS:
        raise UserError(
            f"optim.name={config.optim.name} does not work with FSDP: use one of "
            f"{', '.join(_SHARDED_OPTIMIZERS)}"
        )


def _check_deepspeed(config: RunConfig) -> None:
    if not isinstance(config, FullRun):
        raise UserError(
            "DeepSpeed is for full fine-tuning (train/full.py): launch this with --config_file "
            "configs/accelerate/multi_gpu.yaml"
        )
    if any(os.environ.get(name, usual[0]) not in usual for name, usual in _DEEPSPEED.items()):
        raise UserError(
            "DeepSpeed works here with zero_stage: 2 or 3, zero3_init_flag: false and nothing "
            "offloaded: launch with --config_file configs/accelerate/deepspeed.yaml or "
            "deepspeed_zero3.yaml"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" and config.train.ema_decay:
        raise UserError(
            f"train.ema_decay={config.train.ema_decay} does not work with DeepSpeed's zero_stage: "
            "3: leave it out, or launch with --config_file configs/accelerate/fsdp.yaml"
        )
    if config.optim.name != "adamw" or config.train.mixed_precision == "fp16":
        raise UserError(
            f"optim.name={config.optim.name} with train.mixed_precision="
            f"{config.train.mixed_precision} does not work with DeepSpeed: use adamw, and bf16 or "
            "no; or launch with --config_file configs/accelerate/fsdp.yaml"
        )
    require_deepspeed()


def _launched_with(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _check_held_out(config: RunConfig, found: Pictures) -> list[str]:
    """What validation and evaluation need; returns lines of the plan on it."""
    path = config.evaluation.path
    if path is not None and not path.is_dir():
        raise UserError(
            f"evaluation.path={path} is not a folder: give the held-out pictures, or "
            "evaluation.path=null"
        )
    held_out = validation_data.find(config)
    if held_out is not None:
        _check_held_out_tokens(config, held_out)
        return validation_data.describe(config, held_out, found)
    if config.validation.use_best and config.validation.score is None:
        raise UserError(
            "validation.use_best=true needs held-out pictures to find the best on: give "
            "validation.path= (or evaluation.path=) and a validation.every above 0, or leave it out"
        )
    return []


def _scoring(config: RunConfig, found: Pictures) -> Scoring | None:
    """What evaluation during training needs, all of it checked."""
    from eval import in_training

    return in_training.prepare(config, found) if config.evaluation.every else None


def _check_held_out_tokens(config: RunConfig, held_out: Pictures) -> None:
    """Raises UserError where only new words train and no held-out caption has one."""
    if not isinstance(config, TextualInversionRun) or config.lora is not None:
        return
    words = [token.token for token in config.textual_inversion.tokens]
    if not any(word in text.lower() for _, text in held_out.worded() for word in words):
        raise UserError(
            f"no caption of the held-out pictures holds {' or '.join(words)}, so their loss cannot "
            "change: write one into each, or do without validation, validation.every=0"
        )


def _check_output(config: RunConfig) -> None:
    output = config.output.resolve()
    for source in config.data.named_sources():
        folder = Path(source.path).resolve()
        listed = any(folder.glob("metadata.*")) or any(folder.glob("dataset_*.json"))
        if not listed and folder.is_dir() and (output == folder or folder in output.parents):
            raise UserError(
                f"output={config.output} lies in data.path={source.path}, so its previews would be "
                "taken for pictures: choose another output="
            )


def _say_long_captions(found: Pictures) -> None:
    """What the run itself, which has the tokenizer, says exactly."""
    count = token_counter(None)
    long = [id for id, text in found.worded() if count([text])[0] > found.tokens]
    if long:
        what = f"captions of more than {found.tokens} words and marks, which will be cut"
        screens.say(f"note     {few(what, list(dict.fromkeys(long)))}")
