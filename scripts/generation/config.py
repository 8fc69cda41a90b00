"""The keys of scripts/generate.py, and which mode they ask for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from eval.generation import Size
from eval.sampling import SamplingConfig
from train.config import ModelConfig, UserError
from train.families import BaseModel

Mode = Literal["txt2img", "img2img", "inpaint", "depth2img", "upscale"]
# How much of a picture is drawn anew where strength= does not say.
STRENGTHS: dict[Mode, float] = {"img2img": 0.8, "depth2img": 0.8, "inpaint": 1.0}
_SIDES = 4
_NOISE = 20
_SEEDS = 2**63
_FARTHEST = 4096  # pixels


class BaseConfig(ModelConfig):
    path: str = "data/assets/toy-base"
    """The base model (also model=PATH): a diffusers folder, a .safetensors file, or a hub id."""


class GenerateConfig(SamplingConfig):
    """Pictures from a base model and adapters (scripts/generate.py)."""

    model: BaseConfig = BaseConfig()
    adapters: list[str] = []
    """LoRA or embedding folders or .safetensors files, each `path` or, of a LoRA, `path:scale`."""
    seeds: list[Annotated[int, Field(ge=0)]] = []
    """Each prompt with each of these, in place of `seed` and `count`."""
    image: Path | None = None
    """A picture to start from, or a folder of several, each of which meets each prompt."""
    strength: float | None = Field(None, gt=0, le=1)
    """How much of `image` is drawn anew; default 0.8, of what a mask shows 1."""
    mask: Path | None = None
    """White where `image` is to be repainted; or a folder with a mask of each picture's name."""
    outpaint: list[Annotated[int, Field(ge=0, le=_FARTHEST)]] = []
    """Pixels to add to `image` left, top, right and bottom; or one number for all sides."""
    mask_blur: int = Field(4, ge=0, le=64)
    """Pixels over which what is repainted fades into what is kept."""
    paste_back: bool = True
    """What a mask keeps are the picture's own pixels, not those that went through the VAE."""
    depth: Path | None = None
    """For depth models: a depth map of `image`, near things bright, or a folder with one of each
    picture's name. Default: what the base's own depth estimator sees."""
    controlnet: list[str] = []
    """ControlNets, each a diffusers folder or hub id, `path` or `path:scale`."""
    control_image: list[Path] = []
    """Of each ControlNet its map (edges, depth, pose), as it was trained to read it; or a folder
    with one of each picture's name."""
    noise_level: int | None = Field(None, ge=0)
    """For the x4 upscaler: noise on the picture before it is enlarged; more invents more. Default
    20."""
    weighting: bool = True
    """(word:1.3), (word) and [word] in prompts weigh; \\( is a bracket. false: as it stands."""
    grid: bool = False
    """Also write grid.png, a sheet of all pictures: prompts down, seeds across."""
    overwrite: bool = False
    """Replace pictures in `output` that are there and were made with other settings."""
    watermark: str | None = None
    """1 to 4 letters to hide in the pixels, where they survive JPEG, cropping and resizing;
    eval/watermark.py finds them again."""
    vae_tiling: bool = False
    """Decode in tiles, for large pictures on small GPUs; seams are blended."""
    vae_slicing: bool = False
    """Decode one picture of a batch after the other."""
    attention_slicing: bool = False
    """Attend in slices: less memory, slower."""
    offload: Literal["no", "model", "sequential"] = "no"
    """Keep parts in main memory until they are used: whole models, or (slow) layer by layer."""

    @field_validator("adapters", "seeds", "controlnet", "control_image", mode="before")
    @classmethod
    def _one_of_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int | Path) else value

    @field_validator("outpaint", mode="before")
    @classmethod
    def _all_sides(cls, value: Any) -> Any:
        return [value] * _SIDES if isinstance(value, int) else value

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        if self.outpaint and (len(self.outpaint) != _SIDES or not any(self.outpaint)):
            raise ValueError(
                f"outpaint={self.outpaint}: give pixels on the left, top, right and bottom, like "
                "outpaint='[0, 0, 128, 0]'"
            )
        for key in ("strength", "mask", "outpaint", "depth"):
            if getattr(self, key) and self.image is None:
                raise ValueError(f"{key}= is about a picture: give image=FILE with it")
        if self.outpaint and (self.mask or self.width or self.height):
            raise ValueError(
                "outpaint= says by itself what is painted and how large: leave out "
                "mask=, width= and height="
            )
        if len(self.controlnet) != len(self.control_image):
            raise ValueError(
                f"controlnet= names {len(self.controlnet)} and control_image= "
                f"{len(self.control_image)}: give each ControlNet its picture"
            )
        if self.seeds and (self.count > 1 or self.seed):
            raise ValueError("seeds= lists all seeds: leave out seed= and count=")
        self.check_seeds(self.count * max(1, len(self.prompts)))
        return self

    def check_seeds(self, pictures: int) -> None:
        """Raises ValueError where one of so many pictures would have no seed."""
        key, last = "seed", self.seed + pictures - 1
        if self.seeds:
            key, last = "seeds", max(self.seeds)
        if last >= _SEEDS:
            raise ValueError(
                f"{key}=: the greatest seed of a picture would be {last}, and has to be below "
                f"2**63 = {_SEEDS}; picture k has seed + k"
            )

    @property
    def noise(self) -> int:
        """The noise level of the x4 upscaler."""
        return _NOISE if self.noise_level is None else self.noise_level

    def drawn_anew(self, mode: Mode) -> float | None:
        """The strength of that mode; None where it has none."""
        return None if mode not in STRENGTHS else self.strength or STRENGTHS[mode]


def mode_of(config: GenerateConfig, base: BaseModel | None) -> Mode:
    """What the keys ask of a base; None stands for the x4 upscaler. Raises UserError where it is
    of a family that does not do that."""
    if base is None:
        return _upscale(config)
    if config.noise_level is not None:
        raise UserError(
            f"noise_level={config.noise_level} is for the x4 upscaler, and model.path={base.path} "
            f"is {base.family}: leave it out"
        )
    if base.family.channels == 4:
        return _of_text(config, base)
    if config.image is None:
        raise UserError(
            f"model.path={base.path} is {base.family}: it makes no pictures from text alone; give "
            f"image=FILE{' and mask=FILE or outpaint=PIXELS' if base.family.inpainting else ''}"
        )
    return _inpaint(config, base) if base.family.inpainting else _depth(config, base)


def _upscale(config: GenerateConfig) -> Mode:
    if config.image is None:
        raise UserError(
            f"model.path={config.model.path} is the x4 upscaler: give image=FILE, and a prompt "
            "that describes it"
        )
    keys = ("mask", "outpaint", "depth", "controlnet", "strength", "width", "height")
    _refuse(config, keys, f"{config.model.path} is the x4 upscaler, which only enlarges")
    return "upscale"


def _of_text(config: GenerateConfig, base: BaseModel) -> Mode:
    _refuse(
        config,
        ("depth",),
        f"{base.path} is {base.family}, which sees no depth; take a depth base "
        "(sd2-community/stable-diffusion-2-depth), or a depth ControlNet with control_image=",
    )
    if config.mask or config.outpaint:
        return "inpaint"
    return "img2img" if config.image else "txt2img"


def _inpaint(config: GenerateConfig, base: BaseModel) -> Mode:
    _refuse(config, ("depth",), f"{base.path} is {base.family}, which sees no depth")
    if not config.mask and not config.outpaint:
        raise UserError(
            f"model.path={base.path} is {base.family}: say what of image={config.image} to "
            "repaint with mask=FILE, or what to add with outpaint=PIXELS"
        )
    return "inpaint"


def _depth(config: GenerateConfig, base: BaseModel) -> Mode:
    keys = ("mask", "outpaint", "controlnet")
    _refuse(config, keys, f"{base.path} is {base.family}, which draws whole pictures by depth")
    return "depth2img"


def _refuse(config: GenerateConfig, keys: tuple[str, ...], why: str) -> None:
    for key in keys:
        if getattr(config, key):
            raise UserError(f"{key}= does not go with this base: model.path={why}")


def check_watermark(config: GenerateConfig, sizes: Iterable[Size], factor: int = 1) -> None:
    """Raises UserError for a watermark that does not fit what is to be made, `factor` times as
    large as those sizes."""
    if config.watermark is None:
        return
    from eval.watermark import SMALLEST, check_payload

    try:
        check_payload(config.watermark.encode())
    except ValueError as error:
        raise UserError(f"watermark={config.watermark}: {error}") from None
    made = ((factor * width, factor * height) for width, height in sizes)
    if small := next((size for size in made if min(size) < SMALLEST), None):
        raise UserError(
            f"watermark={config.watermark} needs pictures of {SMALLEST} pixels a side, and one is "
            f"to have {small[0]} x {small[1]}"
        )


def check_steps(config: GenerateConfig, mode: Mode, timesteps: int) -> None:
    """Raises UserError for more steps than the base has `timesteps`, and where the strength leaves
    no step to take."""
    if config.steps > timesteps:
        raise UserError(
            f"steps={config.steps} is more than the {timesteps} timesteps that "
            f"model.path={config.model.path} was trained at: lower it"
        )
    strength = config.drawn_anew(mode)
    if strength is not None and int(config.steps * strength) < 1:
        raise UserError(
            f"strength={strength} of steps={config.steps} is less than one step: raise either"
        )
