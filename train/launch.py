"""The accelerator of a run, however it was launched."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch

# Imported once the processes are joined, as diffusers would, it holds on to their group for good,
# and a thread of that group can then abort a process that has ended well.
import torch.distributed.nn.functional
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from train import sharding, zero
from train.config import UserError
from train.stopping import PATIENCE, Agreement, joining


def open_accelerator(mixed_precision: str, *, tf32: bool = False) -> Accelerator:
    """An Accelerator for `accelerate launch`, `torchrun` or plain `python`.

    Under torchrun without a GPU, Accelerate makes every process rank 0 of 1 without a word unless
    told to use the CPU; they would all write to one run directory. tf32: whether products of fp32
    may be rounded to it, convolutions too, which torch rounds unless told not to.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        with joining() if workers > 1 else nullcontext():
            accelerator = Accelerator(
                mixed_precision=mixed_precision,
                cpu=workers > 1 and not torch.cuda.is_available(),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
                fsdp_plugin=sharding.plugin(mixed_precision),
                deepspeed_plugin=zero.plugin(),
            )
            Agreement(accelerator).wait()
    except ValueError as error:
        raise UserError(
            f"train.mixed_precision={mixed_precision} does not work here: {error}"
        ) from None
    assert accelerator.num_processes == workers, "the processes were not joined"
    return accelerator
