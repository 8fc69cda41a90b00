"""Pictures that the base makes, kept in the cache for all runs that want them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data.images import Size
from data.wording import Wording
from train.config import DreamBoothRun, RunFailed, UserError
from train.stopping import jointly

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.method import Pipeline

MADE = "prior-"  # how the folders begin, in the cache
_RECORD = "class_pictures.json"  # in the run directory


@dataclass(frozen=True)
class Wanted:
    """A picture to be made, the same whatever else is made with it."""

    name: str
    """Its file, below the folder of its base and settings."""
    prompt: str
    size: Size
    seed: int


def wanted(prompt: str, sizes: Sequence[Size]) -> list[Wanted]:
    """One picture of each size; the k-th of a size has the seed k, whatever the run's is. Of
    wildcards in the prompt each has its own choice."""
    words, counts, found = Wording(wildcards="{" in prompt), Counter[Size](), []
    for size in sizes:
        number = counts[size]
        counts[size] += 1
        name = f"{size[0]}x{size[1]}-{number:05d}.png"
        drawn = words.caption((prompt,), seed=0, epoch=0, id=name)
        found.append(Wanted(f"{_folder_name(prompt)}/{name}", drawn, size, number))
    return found


def _folder_name(prompt: str) -> str:
    """For people to read, and different for every prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return f"{slug}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def make(
    pictures: Sequence[Wanted], pipeline: Pipeline, config: DreamBoothRun, accelerator: Accelerator
) -> Path:
    """The folder of the pictures, every process having made its share of what it lacked.

    They are the base's own: its scheduler's settings are the checkpoint's, whatever the
    configuration overrides for training. Raises UserError where they cannot be made, or not be had
    by all processes, and RunFailed where the memory does not suffice.
    """
    if not pictures:
        return config.data.cache
    with _as_it_came(pipeline):
        folder = config.data.cache / f"{MADE}{_key(pipeline, config)}"
        mine = partial(_generate, pictures, folder, pipeline, config, accelerator)
        paths = jointly(accelerator, mine)
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise UserError(
            f"data.cache={config.data.cache} is not the same folder for all processes: {missing}, "
            "which another one made, is not there. Put it on a disk that all machines share"
        )
    if accelerator.is_main_process:
        _say_flat(paths)
        _remember(config.output, paths)
    return folder


@contextmanager
def _as_it_came(pipeline: Pipeline) -> Iterator[None]:
    trained = pipeline.scheduler
    pipeline.scheduler = pipeline.base_scheduler
    try:
        yield
    finally:
        pipeline.scheduler = trained


def _key(pipeline: Pipeline, config: DreamBoothRun) -> str:
    """Of all that a picture depends on but prompt, size and seed."""
    from eval.generation import scheduler_settings, weights
    from train.models import tokenizer_fingerprint

    how = config.dreambooth
    facts = [
        weights(pipeline),
        tokenizer_fingerprint(pipeline.tokenizer),
        scheduler_settings(pipeline),
        (how.class_steps, how.class_guidance, config.train.mixed_precision),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _generate(
    pictures: Sequence[Wanted],
    folder: Path,
    pipeline: Pipeline,
    config: DreamBoothRun,
    accelerator: Accelerator,
) -> list[Path]:
    import torch

    from eval.generation import NotFinite, generate
    from train import resting

    how = config.dreambooth
    try:
        with resting.awake(pipeline, accelerator.device), accelerator.autocast():
            return generate(
                pipeline,
                [one.prompt for one in pictures],
                seeds=[one.seed for one in pictures],
                names=[one.name for one in pictures],
                steps=how.class_steps,
                guidance=how.class_guidance,
                size=[one.size for one in pictures],
                batch_size=how.class_batch_size,
                folder=folder,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                label="making class pictures",
            )
    except NotFinite as error:
        raise UserError(
            f"dreambooth.prior=images: {error.what} at train.mixed_precision="
            f"{config.train.mixed_precision}. Use bf16 or no; if that does not help, the base is "
            "broken"
        ) from None
    except torch.OutOfMemoryError:
        raise RunFailed(
            f"the memory does not suffice for dreambooth.class_batch_size={how.class_batch_size} "
            "class pictures at once: lower it; the same command goes on where it was"
        ) from None
    except OSError as error:
        raise UserError(f"data.cache={config.data.cache} cannot be used ({error})") from None


def _say_flat(paths: Sequence[Path]) -> None:
    from data.listing import few
    from eval.generation import of_one_colour

    if flat := of_one_colour(paths):
        what = few("class pictures of one colour all over, which teach nothing", flat)
        print(f"note     {what}: look at them, and choose another dreambooth.class_prompt")


def _remember(output: Path, paths: Sequence[Path]) -> None:
    """Keeps a hash of the pictures in the run directory. Which they are is bound to the run by its
    configuration, base and data; but made anew, on another device say, they differ by rounding,
    which is no reason to refuse to resume."""
    from data.files import write_atomically
    from train.rundir import has_checkpoints

    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    file, now = output / _RECORD, {"pictures": len(paths), "sha256": digest.hexdigest()[:16]}
    if file.exists() and has_checkpoints(output) and json.loads(file.read_text()) != now:
        print(
            "note     the class pictures were made anew, and differ by rounding from those that "
            "this run has seen: it will not end in the very bits that it would have"
        )
    write_atomically(file, (json.dumps(now, indent=2) + "\n").encode())
