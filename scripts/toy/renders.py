"""Pictures of the toy world in memory, for the recipes of the toy VAE, CLIP and checker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data import toy
from data.counter import generator


def wide_world(seed: int, count: int) -> tuple[list[np.ndarray], list[str]]:
    """Pictures of everything there is, in three aspect ratios, and their captions.

    Two in five are plain, the others in each style in turn; every seventh shows a subject.
    Shapes are placed freely. Pictures are uint8 (H, W, 3).
    """
    styles, subjects = [None, None, *toy.STYLES], list(toy.SUBJECTS)
    pictures, captions = [], []
    for index in range(count):
        width, height = toy.ASPECTS[(0, 1, 0, 2)[index % 4]]
        scene = toy.sample_scene(seed, index, width=width, height=height, freedom=1.0)
        subject = subjects[index // 7 % len(subjects)] if index % 7 == 0 else None
        style = styles[index % len(styles)]
        pictures.append(toy.render(scene, width, height, style=style, subject=subject))
        captions.append(_caption(scene, subject, style, seed, index))
    return pictures, captions


def _caption(
    scene: toy.Scene, subject: str | None, style: str | None, seed: int, index: int
) -> str:
    """Names the style in half of the captions and the subject in half, as people do: a picture
    drawn in ink is still a red circle."""
    name_style, name_subject = generator(seed, "naming", index).uniform(size=2) < 0.5
    if subject and not name_subject:
        figure = toy.SUBJECTS[subject]
        scene = replace(scene, shape=figure.body, colour=figure.colour)
    return toy.caption(
        scene, name=subject if name_subject else None, style=style if name_style else None
    )


def to_pixels(pictures: list[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) each -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
