"""How much memory the tensors of a computation hold, counted without having it: the computation
runs on fake tensors, which have shapes and no contents."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAPPED_FROM = 32 << 20
"""Bytes from which on glibc's malloc always maps a block by itself, and gives it back."""


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made within it, until each is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        """Held now, and the most that was held since `mark`."""
        self.churned = 0
        """All that was ever made in blocks that malloc does not map one by one, gone or not."""
        self.away = False
        """Whether what is made now does not count."""
        self._held: dict[int, tuple[Any, int]] = {}

    def mark(self) -> None:
        self.peak = self.bytes

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = 0 if self.away else storage.nbytes()
        self._held[key] = weakref.ref(storage, lambda _: self._count(-self._held.pop(key)[1])), size
        self._count(size)
        self.churned += size if size < MAPPED_FROM else 0
        self.peak = max(self.peak, self.bytes)

    def _count(self, size: int) -> None:
        self.bytes += size


@contextmanager
def counting(device: str) -> Iterator[Live]:
    """Within it tensors are fake, and what they would hold is counted.

    device: cuda or cpu, as whose kernels the computation is to be counted. The tensors themselves
    say that they are on the CPU either way.
    """
    live = Live()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(live)
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        if device == "cuda":
            for name in ("layer_norm", "group_norm"):
                norm = _norm_in_fp32(getattr(functional, name))
                stack.enter_context(patch.object(functional, name, norm))
        yield live


def _apply(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """What `module.to` does, with new parameters: fake ones cannot be changed where they are."""
    for part in module.modules() if recurse else [module]:
        for name, old in part._parameters.items():
            if old is not None and (new := change(old)) is not old:
                part._parameters[name] = nn.Parameter(new.detach(), old.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)
    return module


def _norm_in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm as autocast has it on a GPU and not on a CPU: it computes in fp32, and so gives fp32
    (https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-autocast-to-float32)."""

    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return norm(*args, **kwargs)

    return wide


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
