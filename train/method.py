"""The seam between the one training loop and what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from train.config import OptimConfig

if TYPE_CHECKING:
    from torch import nn

Pipeline: TypeAlias = Any
"""A diffusers StableDiffusionPipeline, whose parts have no types of their own."""


class Method(Protocol):
    """What `loop.fit` needs to know of a method.

    To add a method, write a class like this and an entry beside it; train/lora.py is an example.
    """

    @property
    def model(self) -> nn.Module:
        """`forward(batch) -> losses (B,)` in fp32; `requires_grad` marks what trains.

        The loss is the forward so that one distributed wrapper serves even where the UNet and the
        text encoder both train.
        """

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer: `params`, and whatever differs from the defaults (`lr` is a
        peak rate)."""

    def pipeline(self) -> Pipeline | None:
        """A pipeline around the live weights, for previews; None where there is nothing to show."""

    def export(self, directory: Path) -> None:
        """Writes what the user takes away into an empty directory."""
