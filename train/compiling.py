"""torch.compile of a model's repeated blocks, each kind once, for whatever shapes come.

Compiled whole, a UNet takes minutes before its first step, and as long again for every bucket. Its
blocks are few kinds: twelve residual ones and three transformers in SD 2.1.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

How = Literal["none", "blocks", "graphs"]
BLOCKS = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}
"""Of diffusers and transformers, by the names of their classes."""
KINDS = 64  # of one block that are compiled at the most; others run as they are


def check(how: How, device: str) -> None:
    """Raises UserError where train.compile=`how` cannot work on a `device` (cpu, cuda)."""
    if how == "none":
        return
    if how == "graphs" and device != "cuda":
        raise UserError(
            f"train.compile=graphs replays CUDA graphs, and training runs on the device {device}: "
            "use train.compile=blocks, or none"
        )
    wanted = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc")]
    if device != "cpu" and "CC" not in os.environ:
        wanted.append("clang")
    language, variable = ("C++", "CXX") if device == "cpu" else ("C", "CC")
    if not any(map(shutil.which, wanted)):
        raise UserError(
            f"train.compile={how} needs a {language} compiler, and there is no "
            f"{' or '.join(wanted)}: install one, name it in the environment variable {variable}, "
            "or use train.compile=none"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise UserError(
            f"train.compile={how} needs Python's headers, and {headers} has no Python.h: install "
            "them (python3-dev), or use train.compile=none"
        )


def compile_regions(model: nn.Module, how: How, *, backend: str = "inductor") -> None:
    """Compiles the repeated blocks of a model in place, lazily, for training.

    To be called once adapters are attached and before anything wraps the model; names and
    parameters stay. Where no gradients are recorded (validation, previews, a prior's prediction)
    the blocks run uncompiled. Dropout draws what it draws uncompiled. With "graphs" each block's
    kernels are recorded as a CUDA graph for every shape, and replayed.
    """
    if how == "none":
        return
    _settle()
    options = None
    if backend == "inductor":
        options = {
            "fallback_random": True,
            "layout_optimization": False,  # whose strides are those of the first shape
            "triton.cudagraphs": how == "graphs",
        }
    for block in regions(model):
        if block._compiled_call_impl is not None:
            return  # all of them are
        block.compile(dynamic=True, backend=backend, options=options)
        compiled: Any = block._compiled_call_impl
        block._compiled_call_impl = partial(_call, compiled, block._call_impl)
    if how == "graphs":
        _keep_apart(model)


def regions(model: nn.Module) -> Iterator[nn.Module]:
    """What is compiled of a model."""
    return (module for module in model.modules() if type(module).__name__ in BLOCKS)


def _call(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **named: Any) -> Any:
    import torch

    return (compiled if torch.is_grad_enabled() else plain)(*args, **named)


def _settle() -> None:
    """Settings of the whole process that let one compilation serve all shapes."""
    import torch
    import torch._dynamo
    import torch.fx.experimental._config as symbols
    from torch._inductor import lowering

    symbols.use_duck_shape = False  # else a first square bucket means that all are square
    torch._dynamo.config.recompile_limit = KINDS
    torch._dynamo.config.optimize_ddp = False  # it cuts at DDP's buckets what is small already
    # Inductor's own (torch 2.13) asks for the strides in numbers, which fixes height and width.
    lowering.make_fallback(
        torch.ops.aten.convolution_backward, lowering.constrain_to_fx_strides, warn=False
    )


def _keep_apart(model: nn.Module) -> None:
    """A graph writes where it wrote before: a forward pass has to say that it begins anew, and what
    outlives it, the gradients, has to be elsewhere."""
    import torch

    def begin(module: nn.Module, inputs: Any) -> None:
        torch.compiler.cudagraph_mark_step_begin()

    def copied(gradient: Tensor) -> Tensor:
        return gradient.clone()

    model.register_forward_pre_hook(begin)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(copied)
