"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054). Stage 2: every process keeps all
weights, and of the gradients and the optimizer's state a part. Stage 3: of the weights too.

DeepSpeed joins the parameters of each of the optimizer's groups into flat tensors, of which every
process trains a copy of its part. What is here shows the state of that by parameter. Between
forward and backward passes the parameters themselves are empty at stage 3, but within `whole`.
"""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin


def plugin() -> DeepSpeedPlugin | None:
    """What tells Accelerate to use DeepSpeed where its launcher says so; else None.

    DeepSpeed itself trains in fp32: lower precision is for the forward pass alone, as everywhere
    else. The sizes of batches are no concern of it, for each loss is a part of its step's.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return None
    from accelerate.utils import DeepSpeedPlugin

    found = DeepSpeedPlugin(gradient_accumulation_steps=1)
    fp32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}
    found.deepspeed_config.update(train_micro_batch_size_per_gpu=1, **fp32)
    # By it transformers would know of stage 3, and split what it loads before anyone has seen it.
    found.set_deepspeed_weakref = lambda: None
    return found


def is_used(accelerator: Accelerator) -> bool:
    from accelerate.utils import DistributedType

    return accelerator.distributed_type == DistributedType.DEEPSPEED


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> tuple[nn.Module, ZeroOptimizer]:
    """`accelerator.prepare` with ZeRO. The forward pass is as Accelerate, which leaves precision to
    DeepSpeed, would have made it; DeepSpeed clips."""
    bf16 = torch.autocast(
        accelerator.device.type, dtype=torch.bfloat16, enabled=config.mixed_precision == "bf16"
    )
    model.forward = bf16(model.forward)
    accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] = config.clip_norm
    engine, wrapped = accelerator.prepare(model, optimizer)
    return engine, ZeroOptimizer(wrapped.optimizer)


def splits(model: nn.Module) -> bool:
    """Whether the optimizer's state of a model's parameters is split."""
    return is_in_parts(model) or any(hasattr(p, "_hp_mapping") for p in model.parameters())


def is_in_parts(model: nn.Module) -> bool:
    """Whether the weights themselves are split: stage 3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def whole(parameters: Iterable[nn.Parameter], *, written: bool = False) -> Iterator[None]:
    """Within it every process has all of these parameters, where stage 3 splits them. A place where
    all processes meet. written: what they hold at its end, on the first process, is what stays."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if written else None):
        yield


class ZeroOptimizer:
    """DeepSpeed's optimizer with its groups and its state by the parameters of the model. All
    processes read and write the state together, in the same order."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        in_parts = hasattr(zero, "fp32_partitioned_groups_flat")
        flats, joined, owners, find = _stage_3(zero) if in_parts else _stage_2(zero)
        groups: list[list[nn.Parameter]] = [[] for _ in zero.param_groups]
        for owner, parameters in zip(owners, joined, strict=True):
            groups[owner].extend(parameters)
        self.param_groups = [
            _Group(group, parameters)
            for group, parameters in zip(zero.param_groups, groups, strict=True)
        ]
        self.state = {
            parameter: _State(_shape(parameter), find(parameter), flat, zero.state[flat])
            for flat, parameters in zip(flats, joined, strict=True)
            for parameter in parameters
        }

    @property
    def overflow(self) -> bool:
        """Whether it left out the step, for a gradient that is not finite."""
        return bool(self._zero.overflow)

    def step(self) -> None:
        """DeepSpeed has done it, in the backward pass of the last micro-batch."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """DeepSpeed has done it."""

    def refresh(self) -> None:
        """Takes the weights that were put into the model for those to be trained on."""
        self._zero.refresh_fp32_params()


class _Group(UserDict[str, Any]):
    """An optimizer's group, with the model's parameters in place of the flat one."""

    def __init__(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        self.data = group
        self._parameters = parameters

    def __getitem__(self, key: str) -> Any:
        return self._parameters if key == "params" else self.data[key]


class _Fragment(NamedTuple):
    """What this process has of a parameter."""

    inside: int  # where it begins in the flat tensor
    outside: int  # where it begins in the parameter, flattened
    length: int


Joined = tuple[
    Sequence[Tensor],  # the flat tensors
    Sequence[Sequence[nn.Parameter]],  # what each was joined of
    Sequence[int],  # which of the optimizer's groups each belongs to
    Callable[[nn.Parameter], _Fragment | None],
]


def _stage_2(zero: Any) -> Joined:
    def find(parameter: Any) -> _Fragment | None:
        own = parameter._hp_mapping
        if own is None:
            return None
        here, there = own.hp_fragment_address, own.lp_fragment_address
        return _Fragment(here.start, there.start, here.numel)

    flats = zero.single_partition_of_fp32_groups
    return flats, zero.bit16_groups, range(len(flats)), find


def _stage_3(zero: Any) -> Joined:
    def find(parameter: Any) -> _Fragment:
        _, inside, padded = zero.grad_position[zero.get_param_id(parameter)]
        outside = min(padded * torch.distributed.get_rank(), parameter.ds_numel)
        return _Fragment(inside, outside, min(padded, parameter.ds_numel - outside))

    flats = zero.fp32_partitioned_groups_flat
    owners = [zero.sub_group_to_group_id[number] for number in range(len(flats))]
    return flats, zero.fp16_groups, owners, find


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


class _State:
    """The optimizer's state of one parameter, of which the flat one has all, a part or nothing."""

    def __init__(
        self, shape: torch.Size, own: _Fragment | None, flat: Tensor, state: dict[str, Any]
    ) -> None:
        self._shape, self._own, self._flat, self._state = shape, own, flat, state

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Gathers tensor by tensor."""
        for key, value in self._state.items():
            yield key, value if key == "step" else self._gathered(value)

    def _gathered(self, flat: Tensor) -> Tensor:
        # DeepSpeed's own way, safe_get_full_optimizer_state, finds the first group's state alone.
        whole = torch.zeros(self._shape, dtype=flat.dtype, device=flat.device)
        for inside, outside in self._parts(flat, whole):
            outside.copy_(inside)
        torch.distributed.all_reduce(whole)
        return whole

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key == "step":
            self._state[key] = value
            return
        if key not in self._state:
            self._state[key] = torch.zeros_like(self._flat)
        for inside, outside in self._parts(self._state[key], value):
            inside.copy_(outside)

    def _parts(self, flat: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What this process has of the parameter, if anything, as views of both."""
        if self._own is not None:
            inside, outside, length = self._own
            yield flat.narrow(0, inside, length), whole.view(-1).narrow(0, outside, length)
