"""The sections of a run's configuration that belong to one method or another."""

from __future__ import annotations

import unicodedata
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from train.parsing import Section


class TextLoraConfig(Section):
    """Adapters on the text encoder; their rate is optim.text_encoder.learning_rate."""

    rank: int = Field(8, ge=1)
    """Rank of every update."""
    alpha: float = Field(8.0, gt=0)
    """Strength of the update: its scale is alpha / rank."""
    targets: list[Literal["attention", "feed_forward"]] = Field(["attention"], min_length=1)
    """Which layers: attention (q, k, v, out), feed_forward (fc1, fc2)."""


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
    blocks: dict[str, int] = {}
    """Rank by UNet block, as patterns like `up_blocks.*`, `down_blocks.1.attentions.0` or `*`: of
    those that fit a layer the last counts, 0 leaves it out. The scale stays alpha / rank of the
    two keys above; rank-stabilised it is alpha / sqrt of the layer's own rank."""
    dora: bool = False
    """Train magnitude and direction apart (DoRA, Liu et al. 2024)."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023), so that high ranks learn as fast."""
    text_encoder: TextLoraConfig | None = None
    """Adapters on the text encoder too; null for none."""
    start_from: str | None = None
    """An adapter (folder or .safetensors file) to go on from, of the same rank and targets."""

    @field_validator("blocks")
    @classmethod
    def _ranks(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern, rank in value.items():
            if rank < 0:
                raise ValueError(f"lora.blocks: {pattern}={rank} must be a rank, or 0 to leave out")
        return value


class FullConfig(Section):
    text_encoder: bool = False
    """Train the text encoder too."""


class DreamBoothConfig(Section):
    class_prompt: str | None = None
    """The class without the subject, like "a photo of a dog"."""
    class_path: str | None = None
    """Pictures of the class; default: the base makes them, into data.cache."""
    prior: Literal["images", "prediction", "none"] = "images"
    """What keeps the class as it is: pictures of the class that are trained on beside the
    subject's; prediction: the base's own prediction for the class prompt, no pictures needed."""
    prior_weight: float = Field(1.0, gt=0)
    """The loss is the mean over the subject's pictures plus this times the class's."""
    class_images: int = Field(200, ge=1)
    """Pictures of each class that are made."""
    class_steps: int = Field(25, ge=1)
    """Sampling steps of each."""
    class_guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale of each."""
    class_batch_size: int = Field(4, ge=1)
    """Made at once, per process."""
    text_encoder: bool = False
    """Train all of the text encoder too; for adapters on it set lora.text_encoder instead."""


class TokenConfig(Section):
    token: str = Field(min_length=1)
    """A new word for the vocabulary, like <my-owl>."""
    initial: str = Field(min_length=1)
    """Word or words whose embeddings it starts from."""
    vectors: int | None = Field(None, ge=1, le=75)
    """How many embeddings it has; default: as many as `initial` has tokens."""
    source: str | None = None
    """With several data.sources: the name of the one it is learned from; default: all."""

    @field_validator("token")
    @classmethod
    def _one_word(cls, value: str) -> str:
        # In prompts, diffusers finds a word of several embeddings only in lower case.
        read = unicodedata.normalize("NFC", "".join(value.lower().split()))
        if value != read:
            raise ValueError(
                f"textual_inversion.tokens: token={value!r} must be one word in lower case, as the "
                f"tokenizer reads it: {read or '<my-word>'}"
            )
        return value

    @field_validator("initial")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(
                "textual_inversion.tokens: initial is blank; give the word or words that come "
                "nearest, like `owl`"
            )
        return value


class TextualInversionConfig(Section):
    tokens: list[TokenConfig] = Field(min_length=1)
    """What is learned."""
    captions: Literal["object", "style", "own"] = "object"
    """object, style: sentences around the token (Gal et al. 2022), or those of
    data.captions.templates; own: the pictures' own captions, which must hold it
    (data.captions.trigger puts it there)."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        words = [token.token for token in self.tokens]
        for index, word in enumerate(words):
            if any(word in other for other in words[:index] + words[index + 1 :]):
                raise ValueError(
                    f"textual_inversion.tokens: token={word!r} is there twice, or part of another; "
                    "choose words that do not hold each other, like <a-owl> and <b-owl>"
                )
        return self
