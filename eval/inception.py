"""The Inception-v3 that FID is defined on: the network of 2015, with 1,008 classes.

Szegedy et al., 2016, arXiv:1512.00567. Unlike torchvision's ImageNet network (1,000 classes,
trained anew) its average pooling does not count the border's padding and its last block takes the
maximum, as the TensorFlow graph does that Heusel et al. used (2017, arXiv:1706.08500). Layers have
the names of the well-known conversion of that graph, so that its file can be loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

SIDE, FEATURES, CLASSES = 299, 2048, 1008
MEAN = STD = 128.0  # of levels from 0 to 255


class Layer(NamedTuple):
    """A convolution by name; in a block those of stride 2 go without padding, others keep the
    size."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# One after another; layers in a tuple of their own read the same and are stacked.
Chain = Sequence[Layer | tuple[Layer, ...]]


class Convolution(nn.Module):
    """Without bias, normalised, rectified."""

    def __init__(self, channels: int, layer: Layer, *, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, layer.channels, layer.kernel, layer.stride, padding, bias=False
        )
        self.bn = nn.BatchNorm2d(layer.channels, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains side by side, and the pooled input beside them: their channels are stacked."""

    def __init__(
        self, channels: int, chains: Sequence[Chain], pool: nn.Module, pooled: int = 0
    ) -> None:
        super().__init__()
        self._chains, self.pool = chains, pool
        for chain in chains:
            width = channels
            for step in map(_layers, chain):
                for layer in step:
                    self.add_module(layer.name, _convolution(width, layer))
                width = sum(layer.channels for layer in step)
        self.branch_pool = _convolution(channels, Layer("", pooled)) if pooled else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([*(self._run(c, x) for c in self._chains), self._pooled(x)], dim=1)

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch_pool(self.pool(x))

    def _run(self, chain: Chain, x: torch.Tensor) -> torch.Tensor:
        for step in map(_layers, chain):
            x = torch.cat([self.get_submodule(layer.name)(x) for layer in step], dim=1)
        return x


class Inception(nn.Module):
    """(B, 3, 299, 299), scaled to (level - 128) / 128, to features (B, 2048).

    `fc` leads from there to the 1,008 classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _convolution(3, Layer("", 32, (3, 3), 2))
        self.Conv2d_2a_3x3 = Convolution(32, Layer("", 32, (3, 3)), padding=(0, 0))
        self.Conv2d_2b_3x3 = _convolution(32, Layer("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = _convolution(64, Layer("", 80))
        self.Conv2d_4a_3x3 = Convolution(80, Layer("", 192, (3, 3)), padding=(0, 0))
        self.halve = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _fine(192, 32), _fine(256, 64), _fine(288, 64)
        self.Mixed_6a = _halving_fine()
        self.Mixed_6b, self.Mixed_6c = _long(128), _long(160)
        self.Mixed_6d, self.Mixed_6e = _long(160), _long(192)
        self.Mixed_7a = _halving_long()
        self.Mixed_7b = _wide(1280, _average())
        self.Mixed_7c = _wide(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.halve(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def _fine(channels: int, pooled: int) -> Mixed:
    double = Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3))
    chains: list[Chain] = [
        [Layer("branch1x1", 64)],
        [Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))],
        [Layer("branch3x3dbl_1", 64), *double],
    ]
    return Mixed(channels, chains, _average(), pooled)


def _halving_fine() -> Mixed:
    double = Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3), 2)
    chains: list[Chain] = [
        [Layer("branch3x3", 384, (3, 3), 2)],
        [Layer("branch3x3dbl_1", 64), *double],
    ]
    return Mixed(288, chains, nn.MaxPool2d(3, stride=2))


def _long(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    double = (
        Layer("branch7x7dbl_2", width, column),
        Layer("branch7x7dbl_3", width, row),
        Layer("branch7x7dbl_4", width, column),
        Layer("branch7x7dbl_5", 192, row),
    )
    chains: list[Chain] = [
        [Layer("branch1x1", 192)],
        [
            Layer("branch7x7_1", width),
            Layer("branch7x7_2", width, row),
            Layer("branch7x7_3", 192, column),
        ],
        [Layer("branch7x7dbl_1", width), *double],
    ]
    return Mixed(768, chains, _average(), 192)


def _halving_long() -> Mixed:
    long = Layer("branch7x7x3_2", 192, (1, 7)), Layer("branch7x7x3_3", 192, (7, 1))
    chains: list[Chain] = [
        [Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2)],
        [Layer("branch7x7x3_1", 192), *long, Layer("branch7x7x3_4", 192, (3, 3), 2)],
    ]
    return Mixed(768, chains, nn.MaxPool2d(3, stride=2))


def _wide(channels: int, pool: nn.Module) -> Mixed:
    single = Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))
    double = Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))
    chains: list[Chain] = [
        [Layer("branch1x1", 320)],
        [Layer("branch3x3_1", 384), single],
        [Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)), double],
    ]
    return Mixed(channels, chains, pool, 192)


def _convolution(channels: int, layer: Layer) -> Convolution:
    height, width = layer.kernel
    same = (height // 2, width // 2)
    return Convolution(channels, layer, padding=same if layer.stride == 1 else (0, 0))


def _average() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _layers(step: Layer | tuple[Layer, ...]) -> tuple[Layer, ...]:
    return (step,) if isinstance(step, Layer) else step
