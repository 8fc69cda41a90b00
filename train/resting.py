"""Parts of a pipeline that a GPU holds only while they are at work. Where all is on the CPU,
nothing moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from train.method import Pipeline

_PARTS = ("unet", "vae", "text_encoder")
_REST = "cpu"


def settle(pipeline: Pipeline, device: torch.device, *, text: bool) -> None:
    """After caching: the VAE and, unless `text`, the text encoder leave the device. text: whether
    training needs the text encoder."""
    leaving = (pipeline.vae,) if text else (pipeline.vae, pipeline.text_encoder)
    for part in leaving:
        part.to(_REST)
    _free(device)


@contextmanager
def awake(pipeline: Pipeline, device: torch.device) -> Iterator[None]:
    """Within it all parts are on the device, to make pictures; afterwards, whatever happened, each
    is where it was."""
    parts = (getattr(pipeline, name, None) for name in _PARTS)
    homes = {part: _place(part) for part in parts if part is not None}
    away = [part for part, home in homes.items() if home.type != device.type]
    try:
        for part in away:
            part.to(device)
        yield
    finally:
        for part in away:
            part.to(homes[part])
        if away:
            _free(device)


def rests(part: Any, *, beside: Any) -> bool:
    """Whether a module is on another kind of device than the one that it works with."""
    return _place(part).type != _place(beside).type


def _place(part: Any) -> torch.device:
    first = next(part.parameters(), None)
    return torch.device(_REST) if first is None else first.device


def _free(device: torch.device) -> None:
    """What left the device is of use to others."""
    from accelerate.utils.memory import clear_device_cache

    if device.type != _REST:
        clear_device_cache()
