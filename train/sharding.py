"""Fully sharded training (FSDP2): every process keeps a part of each parameter, of its gradient and
of the optimizer's state. What is here reads and fills such tensors, and leaves others as they are;
train/zero.py is DeepSpeed's share in it.

Each function that gathers is a place where all processes meet.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from train import zero

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    from train.config import TrainConfig
    from train.method import Method

_PARTS = ("unet", "text_encoder")


def plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """What tells Accelerate to shard where its launcher says so; else None.

    Weights are fp32 and are gathered in the precision of the forward pass; gradients meet in fp32.
    Inputs stay as they are, for the noise schedule's sake: `prepare` casts operation by operation,
    as everywhere else.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> tuple[nn.Module, Any]:
    """`accelerator.prepare`, completed for a sharded model. The optimizer has its state by the
    parameters of `model`."""
    if zero.is_used(accelerator):
        return zero.prepare(accelerator, model, optimizer, config)
    prepared: Any
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if _is_in_parts(prepared):
        # Else what the outermost module gathers for a validation stays, and is then out of date.
        prepared.set_reshard_after_forward(True)
        prepared.forward = accelerator.autocast()(prepared.forward)
    return prepared, wrapped


def is_sharded(model: nn.Module) -> bool:
    """Whether a process has but a part of the weights, or of the optimizer's state of them."""
    return _is_in_parts(model) or zero.splits(model)


def _is_in_parts(model: nn.Module) -> bool:
    split = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return split or zero.is_in_parts(model)


def refresh(optimizer: Any) -> None:
    """After weights were put into the model: ZeRO trains copies of them."""
    if isinstance(optimizer, zero.ZeroOptimizer):
        optimizer.refresh()


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """`accelerator.no_sync`, by which DeepSpeed too knows that the step has more to come."""
    accelerator.sync_gradients = False
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = True


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on its device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as a part of the optimizer's state of `parameter`: on its device, and sharded
    as it is where it has its shape."""
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies `value`, whole or sharded as `target` is, into `target`."""
    target.copy_(value if isinstance(value, DTensor) else like(target, value))


@contextmanager
def gathered(method: Method, accelerator: Accelerator) -> Iterator[None]:
    """Within it every process's pipeline of a sharded method has whole copies of its parts, at
    rest."""
    live = _sharded_parts(method)
    gather(method, accelerator, everywhere=True)
    try:
        yield
    finally:
        for name, part in live.items():
            setattr(method.pipeline(), name, part)


def gather(method: Method, accelerator: Accelerator, *, everywhere: bool = False) -> None:
    """Puts whole copies of a sharded method's parts into the main process's pipeline, or that of
    every one, for good: for previews and export."""
    keep = everywhere or accelerator.is_main_process
    for name, part in _sharded_parts(method).items():
        state = _whole_state(part, keep=keep)
        if keep:
            whole_part = _rebuilt(part, state).to(accelerator.device)
            setattr(method.pipeline(), name, whole_part)


def _sharded_parts(method: Method) -> dict[str, nn.Module]:
    if not _is_in_parts(method.model):
        return {}
    parts = {name: getattr(method.pipeline(), name) for name in _PARTS}
    return {name: part for name, part in parts.items() if _is_in_parts(part)}


def _whole_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Its state on the CPU, in the process that is to keep it."""
    state = {}
    with zero.whole(module.parameters()):
        for name, tensor in module.state_dict().items():
            value = whole(tensor)
            if keep:
                state[name] = value.detach().cpu().clone()
    return state


def _rebuilt(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A module like a diffusers or transformers model, without what shards it."""
    from accelerate import init_empty_weights

    # fully_shard puts a class of its own before that of each module that it wraps.
    kind: Any = type(module)
    if isinstance(module, FSDPModule):
        kind = next(base for base in kind.__mro__[1:] if base is not FSDPModule)
    with init_empty_weights():
        config = copy.deepcopy(module.config)
        fresh = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    fresh.load_state_dict(state, assign=True)
    return fresh.eval().requires_grad_(False)
