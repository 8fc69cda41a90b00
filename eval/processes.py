"""The processes of one command, however it was launched: which of them this is, what all of them
found, and how quiet they are."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import PartialState

# Shares differ, and the first to finish waits for the others; one that died ends all at once.
PATIENCE = timedelta(days=7)

T = TypeVar("T")


def join() -> PartialState:
    """This process among those of `accelerate launch`, `torchrun` or plain `python`: its
    `process_index`, `num_processes`, `device`, `wait_for_everyone()`, `destroy_process_group()`."""
    import torch

    # Imported once the processes are joined, as transformers would, it holds on to their group for
    # good, and a thread of that group can then abort a process that has ended well.
    import torch.distributed.nn.functional
    from accelerate import PartialState

    # Without cpu=True each of several processes without a GPU would take itself for the only one.
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    cpu = asked or (several and not torch.cuda.is_available())
    return PartialState(cpu=cpu, timeout=PATIENCE)


def gather(value: T) -> list[T]:
    """What every process gives here, in their order. A place where all of them wait."""
    from accelerate.utils import gather_object

    return gather_object([value])


def quieten() -> None:
    """No bars and notes of the libraries about loading: the work's own progress is what counts."""
    # Of a kernel that is for generating text on a CPU, whenever PEFT is imported.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def one_thread(device: Any) -> None:
    """On a CPU, one thread per process: how many there are moves a value by rounding, and numbers
    must not depend on how a command was launched. Several processes use several cores."""
    import torch

    if device.type == "cpu":
        torch.set_num_threads(1)
