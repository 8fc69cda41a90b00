"""What a base of some family asks of a run's settings, checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from data.images import open_image
from data.maps import open_depth, open_mask
from data.noising import Noising
from train import recomputing
from train.config import (
    DiffusionConfig,
    DreamBoothRun,
    FullRun,
    PreviewConfig,
    RunConfig,
    UserError,
)
from train.families import BaseModel
from train.models import check_zero_snr
from train.packages import require_quantiser

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
        check_zero_snr(config.diffusion.prediction_type or base.prediction_type)
    Noising.of(config.diffusion, base.timesteps)
    _check_previews(config.preview, base)
    if config.evaluation.every and base.family.channels != 4:
        raise UserError(
            f"evaluation.every={config.evaluation.every}: model.path={base.path} is {base.family}, "
            "and pictures that are scored are made from text alone; set evaluation.every=0"
        )
    check_quantised(config)
    recomputing.check(config.train.gradient_checkpointing, config.model)


def check_quantised(config: RunConfig) -> None:
    """What trains needs all its bits: every update is far smaller than a step of 4 or 8."""
    how = config.train.quantize
    in_full = isinstance(config, FullRun) or (
        isinstance(config, DreamBoothRun) and config.lora is None
    )
    if how != "none" and in_full:
        raise UserError(
            f"train.quantize={how} is for a frozen UNet, and here all of it trains: train adapters "
            "(train/lora.py, or DreamBooth with lora={}), or set train.quantize=none"
        )
    lora = getattr(config, "lora", None)
    if how != "none" and lora is not None and lora.dora:
        raise UserError(
            f"lora.dora=true with train.quantize={how}: DoRA begins with the norms of the base's "
            "weights, and those of the rounded ones are not those that the adapter is used with; "
            "leave out one of the two"
        )
    require_quantiser(how)


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
    end = base.family.companion
    opened = open_depth if base.family.depth else open_mask
    if len(preview.images) != len(preview.prompts):
        raise UserError(
            f"preview.images has {len(preview.images)} pictures for {len(preview.prompts)} "
            f"preview.prompts: {base.family} needs one for each, with NAME{end} beside it. Give "
            "them, or preview.every=0"
        )
    for picture in preview.images:
        _read(picture, picture, open_image)
        companion = _read(picture, picture.with_suffix(end), opened)
        least, most = companion.getextrema()
        if base.family.depth and least == most:
            raise UserError(
                f"preview.images={picture}: {picture.with_suffix(end)} is a depth map without depth"
            )


def _read(picture: Path, file: Path, opened: Callable[[Path], Image.Image]) -> Image.Image:
    """`file`, to the last pixel: previews come when a run is under way."""
    try:
        return opened(file)
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        reason = getattr(error, "strerror", None) or error
        remedy = "" if file == picture else f", which has to lie beside {picture.name}"
        raise UserError(
            f"preview.images={picture}: cannot read {file}{remedy} ({reason})"
        ) from None


def notes(config: RunConfig, base: BaseModel) -> list[str]:
    """What is allowed and seldom meant."""
    found = [
        _resolution_note(config.data.resolutions, base.resolution),
        _first_step_note(config.diffusion, base),
        "the base looks distilled, to sample in a few steps: training does not keep that"
        if base.distilled
        else None,
    ]
    return [note for note in found if note]


def _resolution_note(sides: Sequence[int], native: int | None) -> str | None:
    if native is None or any(max(side, native) < _FAR * min(side, native) for side in sides):
        return None
    given = ", ".join(map(str, sides))
    return (
        f"data.resolution={given}, and the base was trained at {native} px: far from that it "
        f"learns slowly and composes badly; data.resolution={native} suits it"
    )


def _first_step_note(diffusion: DiffusionConfig, base: BaseModel) -> str | None:
    """Zero terminal SNR is for the step that sampling starts from."""
    last = base.timesteps - 1
    if not diffusion.zero_terminal_snr:
        return None
    if diffusion.max_timestep is not None and diffusion.max_timestep < last:
        reason = f"diffusion.max_timestep={diffusion.max_timestep} is below it"
    elif diffusion.min_snr_gamma is not None:
        reason = "diffusion.min_snr_gamma gives it the weight 0"
    else:
        return None
    return (
        f"with diffusion.zero_terminal_snr sampling starts at timestep {last}, which is never "
        f"trained: {reason}; leave one of the two out"
    )
