"""Linear layers of a frozen UNet in 8 or 4 bits, for adapters to be trained on.

Each keeps codes and scales, and its weight is put together anew, in the precision of the forward
pass, whenever it is used: int8 is a number of -127 to 127 times a scale for each output (Dettmers
et al. 2022, section 2.1), nf4 the nearest of 16 quantiles of a normal distribution times a scale
for 64 weights (Dettmers et al. 2023, section 3), which bitsandbytes packs and unpacks.

bitsandbytes' own layers are not used. Its 8-bit one rounds the activations too and holds on to them
past what gradient checkpointing lets go of, the 4-bit one knows nothing of autocast, and both
compute otherwise for previews than for training.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

How = Literal["int8", "nf4"]
_BLOCK = 64  # weights with one scale, of nf4


def quantise(model: nn.Module, how: How) -> None:
    """Puts a `Quantised` in the place of every linear layer; all else stays as it is."""
    for name in [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, Quantised(linear, how))


class Quantised(nn.Linear):
    """What a frozen linear layer computes, with its weight rounded to few bits; the bias stays."""

    bias: Any

    def __init__(self, linear: nn.Linear, how: How) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        assert not linear.weight.requires_grad
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self._how = linear.bias, how
        codes, scales = packed(linear.weight.float(), how)
        # Not buffers, which DDP sends around at every step.
        self.codes = nn.Parameter(codes, requires_grad=False)
        # The bits of the scales as integers: the rest of the model is cast, they stay fp32.
        self.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(outputs, inputs), fp32, put together for whoever asks: DoRA's norms, shapes."""
        return unpacked(self.codes, self.scales, self._shape, self._how, torch.float32)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return _Product.apply(input, self.codes, self.scales, self.bias, self._shape, self._how)


class _Product(torch.autograd.Function):
    """x W^T + b, with a gradient for x alone; neither x nor W is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        how: How,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.how = shape, how
        weight = unpacked(codes, scales, shape, how, x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        weight = unpacked(codes, scales, ctx.shape, ctx.how, gradient.dtype)
        return gradient @ weight, None, None, None, None, None


def packed(weight: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """The codes and scales (fp32) of a weight (outputs, inputs), fp32: int8 and one scale for each
    output; or two to a byte, and one scale for 64 of them."""
    if how == "int8":
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return (weight / scales[:, None]).round().to(torch.int8), scales
    codes, scales = _ops().quantize_4bit(weight.contiguous(), _BLOCK, how, torch.uint8)
    return codes, scales


def unpacked(
    codes: Tensor, scales: Tensor, shape: tuple[int, int], how: How, dtype: torch.dtype
) -> Tensor:
    """The weight again, as `shape` and `dtype`; scales: the fp32 ones, or their bits."""
    scales = scales.view(torch.float32)
    if how == "int8":
        return (codes * scales[:, None]).to(dtype)
    return _ops().dequantize_4bit(codes, scales, _BLOCK, how, list(shape), dtype)


def _ops() -> Any:
    import bitsandbytes  # noqa: F401  # whose import makes them

    return torch.ops.bitsandbytes
