"""What a base of some family asks of a run's settings, checked before any weights are loaded."""

from __future__ import annotations

from pathlib import Path

from train.config import PreviewConfig, RunConfig, UserError
from train.families import BaseModel
from train.models import check_zero_snr

_FAR = 1.25  # times the resolution that a base was trained at: from 512 to 768 is 1.5


def check_settings(config: RunConfig, base: BaseModel) -> None:
    """Raises UserError for settings that the base cannot be trained with."""
    _check_depth(config.data.depth, base)
    if base.family.inpainting and config.data.streaming:
        raise UserError(
            f"data.streaming=true: model.path={base.path} is {base.family}, whose masked pictures "
            "are made of pictures that are kept: set data.streaming=false"
        )
    if config.diffusion.zero_terminal_snr:
        check_zero_snr(config.diffusion.prediction_type or base.prediction_type or "")
    _check_previews(config.preview, base)


def _check_depth(depth: bool, base: BaseModel) -> None:
    if base.family.depth and not depth:
        raise UserError(
            f"model.path={base.path} is {base.family}: set data.depth=true, with a depth map for "
            "every picture (scripts/depth.py makes them)"
        )
    if depth and not base.family.depth:
        raise UserError(f"data.depth=true: model.path={base.path} is no depth model; leave it out")


def _check_previews(preview: PreviewConfig, base: BaseModel) -> None:
    """A depth or inpainting model needs a picture for each prompt, and a map or mask for that."""
    if base.family.channels == 4:
        if preview.images:
            raise UserError(
                f"preview.images: model.path={base.path} is {base.family}, which makes pictures "
                "from text alone; leave it out"
            )
        return
    if not (preview.every and preview.prompts):
        return
    end = companion_end(base)
    if len(preview.images) != len(preview.prompts):
        raise UserError(
            f"preview.images has {len(preview.images)} pictures for {len(preview.prompts)} "
            f"preview.prompts: {base.family} needs one for each, with NAME{end} beside it. Give "
            "them, or preview.every=0"
        )
    for picture in preview.images:
        companion = picture.with_suffix(end)
        _check_readable(picture, picture)
        _check_readable(picture, companion)
        if base.family.depth and _is_flat(companion):
            raise UserError(f"preview.images={picture}: {companion} is a depth map without depth")


def companion_end(base: BaseModel) -> str:
    """How the name of what lies beside a preview's picture ends."""
    return ".depth.png" if base.family.depth else ".mask.png"


def _check_readable(picture: Path, file: Path) -> None:
    from PIL import Image

    try:
        with Image.open(file):
            pass
    except OSError as error:
        remedy = "" if file == picture else f", which has to lie beside {picture.name}"
        raise UserError(
            f"preview.images={picture}: cannot read {file}{remedy} ({error.strerror or error})"
        ) from None


def _is_flat(file: Path) -> bool:
    from PIL import Image

    with Image.open(file) as image:
        least, most = image.convert("L" if image.mode in ("RGB", "P") else image.mode).getextrema()
    return least == most


def notes(config: RunConfig, base: BaseModel) -> list[str]:
    """What is allowed and seldom meant."""
    sides = config.data.resolutions
    if base.resolution is None:
        return []
    native = base.resolution
    if any(max(side, native) < _FAR * min(side, native) for side in sides):
        return []
    given = ", ".join(map(str, sides))
    return [
        f"data.resolution={given}, and the base was trained at {native} px: far from that it "
        f"learns slowly and composes badly; data.resolution={native} suits it"
    ]
