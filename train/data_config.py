"""The data section of a configuration: where pictures and captions come from, and what is done to
them.

Imports nothing of this project but the reading of a configuration (train/parsing.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from train.parsing import Section


def _colour(value: tuple[int, int, int]) -> tuple[int, int, int]:
    if not all(0 <= part <= 255 for part in value):
        raise PydanticCustomError("colour", "give three numbers from 0 to 255")
    return value


Colour = Annotated[tuple[int, int, int], AfterValidator(_colour)]


class CaptionConfig(Section):
    """What becomes of a caption each time its picture is seen: a function of (seed, epoch,
    picture)."""

    prefix: str = ""
    """Put before every caption, as it stands (with its own space or comma)."""
    suffix: str = ""
    """Put after every caption, as it stands."""
    trigger: str = ""
    """Word or words every caption must hold; put in front, as a tag, where one lacks it."""
    choose: Literal["first", "random"] = "random"
    """Which is used where a picture has several captions."""
    replace: str = ""
    """Used in place of whatever captions the pictures have."""
    separator: str = ","
    """What parts the tags of a caption, for the three keys below."""
    shuffle_tags: bool = False
    """Put the tags into a new order each time."""
    keep_tags: int = Field(0, ge=0)
    """The first so many tags are neither shuffled nor dropped."""
    tag_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of tags left out, each by itself."""
    wildcards: bool = False
    """Replace {a|b|c} by one of its choices, innermost first."""
    templates: list[str] | Literal["object", "style"] = []
    """Sentences with {} in place of the caption, one drawn each time; "object" and "style" are
    textual inversion's own lists."""
    max_tokens: Literal[75, 150, 225] = 75
    """Tokens of a caption that are read; 150 and 225 are read in windows of 75, joined as the
    common user interfaces join them."""


class Cropping(Section):
    """How pictures become pixels, for one source or for all."""

    resolution: int | list[int] = 768
    """Area budget of every bucket: the side in pixels of its square. Of several, each picture gets
    the largest that it fills without being enlarged, or else the smallest."""
    bucket_step: int = Field(64, ge=8, multiple_of=8)
    """Bucket sides are multiples of this many pixels."""
    min_side: int | None = Field(None, ge=8)
    """Shortest side of a bucket in pixels; default: half of the resolution."""
    max_side: int | None = Field(None, ge=8)
    """Longest side of a bucket in pixels; default: twice the resolution."""
    upscale: bool = True
    """Enlarge pictures smaller than their bucket; if not, they get a smaller one of their own."""
    crop: Literal["centre", "random", "focus"] = "centre"
    """What is kept of a picture that is longer than its bucket: its middle, a random part, or the
    part around its focus point (from metadata, or from NAME.focus.json), its middle where it has
    none."""
    crop_variants: int = Field(4, ge=1, le=64)
    """Different random crops of each picture that are cached; one is drawn each time."""

    @field_validator("resolution")
    @classmethod
    def _sides(cls, value: int | list[int]) -> int | list[int]:
        sides = value if isinstance(value, list) else [value]
        if not sides or min(sides) < 32 or len(set(sides)) != len(sides):
            raise ValueError(f"resolution={value}: give different sides of at least 32 pixels")
        return value

    @property
    def resolutions(self) -> list[int]:
        """All of them, smallest first."""
        value = self.resolution
        return sorted(value) if isinstance(value, list) else [value]


class SourceConfig(Section):
    """One of several sources; what it leaves out is as in the data section."""

    path: str
    """As data.path."""
    name: str | None = None
    """What its pictures' ids begin with; default: the last part of its path."""
    weight: float | None = Field(None, gt=0)
    """Its share of the samples, relative to the other sources'; for all of them or for none."""
    repeats: int = Field(1, ge=1)
    """How often an epoch sees each of its pictures, where no weights are given."""
    caption: str | None = None
    """As data.caption."""
    split: str | None = None
    """As data.split."""
    resolution: int | list[int] | None = None
    """As data.resolution."""
    crop: Literal["centre", "random", "focus"] | None = None
    """As data.crop."""
    captions: CaptionConfig | None = None
    """As data.captions, in place of all of it."""
    class_prompt: str | None = None
    """DreamBooth: as dreambooth.class_prompt, for this source."""
    class_path: str | None = None
    """DreamBooth: as dreambooth.class_path, for this source."""

    @property
    def common_caption(self) -> str | None:
        """The caption that its pictures have in common, if they have one."""
        return (self.captions or CaptionConfig()).replace or self.caption

    @property
    def tokens(self) -> int:
        """How many tokens of its captions are read."""
        return (self.captions or CaptionConfig()).max_tokens


def _name(path: str) -> str:
    """The last part of a path, or of a dataset's name."""
    place = Path(path) if path.startswith("hf:") else Path(os.path.abspath(path))
    return place.name.lstrip(".") or "pictures"


class DataConfig(Cropping):
    path: str | None = None
    """Folder of pictures (captions in .txt/.caption files beside them, in texts/ beside images/, or
    in a metadata.jsonl, .csv or .parquet), a folder of `save_to_disk`, or hf:OWNER/NAME (with :PART
    where it has several)."""
    sources: list[SourceConfig] = []
    """Several of these, instead of `path`."""
    split: str = "train"
    """Which split of a Hugging Face dataset."""
    revision: str | None = None
    """Its branch, tag or commit on the hub."""
    image_column: str | None = None
    """Its column of pictures; default: the only one there is."""
    caption_column: str | None = None
    """Its column of captions; default: text, caption, captions, prompt or txt, if it is there."""
    streaming: bool = False
    """Never store its pictures: they pass once and only latents are kept."""
    caption: str | None = None
    """Caption of the pictures that have none; without it such pictures cannot be used."""
    on_bad_image: Literal["report", "quarantine", "abort"] = "abort"
    """What a picture that cannot be used does: abort before anything is trained; report: be left
    out and named; quarantine: that, and be copied to `quarantine` in the run directory."""
    background: Colour = (255, 255, 255)
    """Red, green and blue, 0 to 255, that transparent pictures are laid over."""
    masks: bool = False
    """Read NAME.mask.png (or NAME-masklabel.png, or masks/NAME) beside the pictures: the loss
    counts where it is white."""
    depth: bool = False
    """Read NAME.depth.png (or depth/NAME) beside the pictures, for the depth model."""
    random_masks: int = Field(8, ge=1, le=256)
    """For the inpainting model: random masks of each picture that are cached; one is drawn each
    time."""
    flip: bool = False
    """Mirror each picture with probability 1/2. Leave off where left and right differ (text,
    faces)."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples trained on the empty caption, so that guidance keeps working."""
    captions: CaptionConfig = CaptionConfig()
    cache: Path = Path("runs/cache")
    """Folder of cached latents and caption embeddings, keyed by content and shared by all runs."""
    cache_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision in which the VAE encodes what is cached; bf16 is faster on a GPU, and deviates."""
    cache_batch_size: int = Field(4, ge=1)
    """Pictures encoded at once while caching, per process."""
    workers: int = Field(2, ge=0)
    """Loader processes per training process."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.path is None) == (not self.sources):
            given = (
                "neither is given" if self.path is None else "both are given: add data.path=null"
            )
            raise ValueError(f"give data.path=my/pictures, or data.sources; {given}")
        if self.streaming and (self.masks or self.depth):
            raise ValueError("data.streaming has no masks or depth maps: set data.masks=false")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("data.sources: give all of them a weight, or none")
        names = [source.name for source in self.named_sources()]
        if len(set(names)) != len(names):
            raise ValueError(
                f"data.sources: names {names} are not all different; give each a `name:`"
            )
        if len({source.tokens for source in self.named_sources()}) > 1:
            raise ValueError("data.sources: captions.max_tokens must be the same for all of them")
        for source in self.sources:
            if source.name is not None and not re.fullmatch(r"[^/.][^/]*", source.name):
                raise ValueError(f"data.sources: name={source.name!r} must be a word, without /")
        return self

    def named_sources(self) -> list[SourceConfig]:
        """The sources, one or several, with all that they leave out filled in."""
        sources = self.sources or [SourceConfig(path=self.path or "")]
        inherited = ("caption", "split", "resolution", "crop", "captions")
        return [
            source.model_copy(
                update={"name": source.name or _name(source.path)}
                | {key: getattr(self, key) for key in inherited if getattr(source, key) is None}
            )
            for source in sources
        ]
