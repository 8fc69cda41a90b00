"""The keys of scripts/prepare.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from data.duplicates import DISTANCE
from data.images import WHITE
from train.config import Colour, Cropping, Section

S = TypeVar("S", bound=Section)


def demand_model(section: S, key: str, model: object, limit: str) -> S:
    """A limit that somebody set needs what measures it, or it would leave out nothing. The default
    is not told from one that was written down for the next run."""
    default = type(section).model_fields[limit].default
    if model is None and getattr(section, limit) not in (None, default):
        raise ValueError(f"{key.partition('.')[0]}.{limit} is set, but {key} is not: give it too")
    return section


class AestheticConfig(Section):
    head: Path | None = None
    """The predictor's weights, .safetensors or .pth; without it there is no aesthetic score."""
    clip: str = "openai/clip-vit-large-patch14"
    """The CLIP that the predictor was trained on: a folder or hub id."""
    relu: bool = False
    """Whether there are rectifiers between its linear layers (LAION's "relu" variants)."""
    minimum: float | None = 4.5
    """Pictures with a lower score are left out; null: only reported."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        return demand_model(self, "aesthetic.head", self.head, "minimum")


class ClipConfig(Section):
    model: str | None = None
    """CLIP folder or hub id; without it the likeness of picture and caption is not measured."""
    minimum: float | None = Field(None, ge=-1, le=1)
    """Pictures whose cosine with their caption is lower are left out; models differ in what is
    usual, so look at the histogram first."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        return demand_model(self, "clip.model", self.model, "minimum")


class NsfwConfig(Section):
    model: str | None = None
    """Image classifier, a transformers folder or hub id; without it there is no such score."""
    label: str | None = None
    """The label that counts; default: the one with "nsfw" in it."""
    maximum: float | None = Field(0.5, ge=0, le=1)
    """Pictures with a higher probability are left out; null: only reported."""

    @model_validator(mode="after")
    def _measured(self) -> Self:
        return demand_model(self, "nsfw.model", self.model, "maximum")


class PrepareConfig(Cropping):
    """A clean training set and a report on it (scripts/prepare.py)."""

    source: str
    """Folder of pictures, as data.path, or a Hugging Face dataset: on disk, or hf:OWNER/NAME."""
    output: Path
    """Folder to write; neither inside the source nor around it."""
    files: Literal["link", "copy", "none"] = "link"
    """How kept pictures get there: hard links where possible, copies, or not at all (reports
    only)."""
    split: str = "train"
    """As data.split."""
    revision: str | None = None
    """As data.revision."""
    image_column: str | None = None
    """As data.image_column."""
    caption_column: str | None = None
    """As data.caption_column."""
    caption: str | None = None
    """As data.caption."""
    on_bad_image: Literal["report", "quarantine", "abort"] = "report"
    """As data.on_bad_image; quarantine copies them to OUTPUT/quarantine."""
    background: Colour = WHITE
    """As data.background."""
    masks: bool = False
    """As data.masks."""
    depth: bool = False
    """As data.depth."""
    smallest: int | None = Field(None, ge=1)
    """Pictures with a side of fewer pixels are left out."""
    max_aspect: float | None = Field(None, ge=1)
    """Pictures whose long side is more than so many times the short one are left out."""
    duplicates: Literal["remove", "report", "off"] = "remove"
    """Of pictures that show the same (also resized, recompressed, mirrored) keep the largest, only
    report them, or do not look for them."""
    duplicate_distance: int = Field(DISTANCE, ge=0, le=24)
    """Bits, of 64, by which the hashes of two such pictures may differ."""
    against: str | None = None
    """A held-out set that exists already: pictures that show the same as one there are left out
    too (with duplicates=remove) or reported."""
    held_out: float = Field(0.0, ge=0)
    """Pictures to hold out for evaluation: a share below 1, or a number of pictures. What an
    earlier run in the same output held out stays so, and so does what it trained on, until this or
    seed is changed."""
    seed: int = 0
    """Which pictures are held out."""
    tokenizer: str | None = None
    """Folder of a tokenizer, or of a base model, that counts the captions' tokens; without it they
    are estimated."""
    max_tokens: Literal[75, 150, 225] = 75
    """As data.captions.max_tokens: longer captions are listed."""
    batch_size: int = Field(8, ge=1)
    """As train.batch_size: for what the report says of small buckets."""
    aesthetic: AestheticConfig = AestheticConfig()
    clip: ClipConfig = ClipConfig()
    nsfw: NsfwConfig = NsfwConfig()
    score_batch_size: int = Field(32, ge=1)
    """Pictures scored at once."""
    device: str | None = None
    """Where scores are computed; default: cuda where there is one, else cpu."""

    @model_validator(mode="after")
    def _whole_number(self) -> Self:
        if self.held_out >= 1 and self.held_out != round(self.held_out):
            raise ValueError(
                f"held_out={self.held_out}: a share below 1, or a whole number of pictures"
            )
        return self
