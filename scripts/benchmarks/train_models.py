"""What the training benchmark trains: base models of three sizes with random weights, and pictures
of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from train.config import ROOT

Size = Literal["toy", "small", "full"]

# SD 2's shape at 8.6 M parameters, and a VAE in SD's proportion to it: one encode is 1.23 times the
# arithmetic of a forward pass of the UNet, as it is 1.21 times at 768 pixels.
_SMALL: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 32,
        "block_out_channels": (32, 64, 128, 128),
        "attention_head_dim": (2, 4, 8, 8),
        "cross_attention_dim": 64,
    },
    "vae": {
        "sample_size": 256,
        "block_out_channels": (16, 16, 32, 32),
        "norm_num_groups": 16,
    },
    "text_encoder": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
}


def base(size: Size, scratch: Path) -> Path:
    """The folder of a base model: the toy one is there, the others are written once."""
    if size == "toy":
        return ROOT / "data/assets/toy-base"
    folder = scratch / f"{size}-base"
    if not (folder / "model_index.json").exists():  # which is written last
        from scripts.toy import random_base

        small = size == "small"
        random_base.write(
            folder,
            seed=0,
            dtype="fp32" if small else "fp16",
            changes=_SMALL if small else {},
        )
    return folder


def pictures(folder: Path, count: int, side: int) -> Path:
    """Square pictures of the toy world with their captions, twice as large as `side`: pictures are
    larger than what is trained on, those of the published example's own dataset about so much."""
    from PIL import Image

    from data import toy

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for index in range(count):
        scene = toy.sample_scene(0, index, width=2 * side, height=2 * side)
        picture = Image.fromarray(toy.render(scene, 2 * side, 2 * side))
        picture.save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.txt").write_text(toy.caption(scene) + "\n", encoding="utf-8")
    return folder
