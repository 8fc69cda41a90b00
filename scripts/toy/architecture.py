"""The toy models' architectures, with random weights: SD 2.1's classes and conventions at a
hundredth of its size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 77  # tokens, as in every CLIP text encoder
TEXT_WIDTH = 128


def build_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges spell the captions' words, with SD 2's special
    tokens.

    As in SD 2 the padding token is "!" (id 0), not end-of-text. Any other text falls back to bytes.
    """
    symbols = list(bytes_to_unicode().values())
    vocabulary = symbols + [f"{symbol}</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    words = Counter(word for text in captions for word in text.replace(",", " ,").split())
    for word in sorted(words):
        _merge_word(word, vocabulary, merges)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="!",
        model_max_length=CONTEXT,
    )


def _merge_word(word: str, vocabulary: list[str], merges: list[tuple[str, str]]) -> None:
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    for left, right in merges:
        pieces = _apply(pieces, left, right)
    while len(pieces) > 1:
        left, right = pieces[0], pieces[1]
        merges.append((left, right))
        vocabulary.append(left + right)
        pieces = _apply(pieces, left, right)


def _apply(pieces: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and merged[-1] == left and piece == right:
            merged[-1] = left + right
        else:
            merged.append(piece)
    return merged


def build_vae() -> Any:
    """Eightfold, four channels, like SD's; trained on every style and subject of the world."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
    )


def text_config(vocabulary: int, **overrides: Any) -> dict[str, Any]:
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "gelu",
        "projection_dim": 64,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    return settings | overrides


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**text_config(len(tokenizer))))


def build_unet() -> UNet2DConditionModel:
    """SD 2's block types, linear projections and heads of equal width, on 16 x 16 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 4),  # in diffusers' SD 2 configs this is the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """SD 2.1's noise schedule and prediction type."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_pipeline(captions: Iterable[str], folder: Path) -> StableDiffusionPipeline:
    """The whole toy base with random weights; the tokenizer's files are written below `folder`."""
    tokenizer = build_tokenizer(captions, folder / "tokenizer")
    return StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_clip(tokenizer: CLIPTokenizer) -> tuple[CLIPModel, CLIPImageProcessorPil]:
    """A CLIP for scores and features: unlike the base's text encoder in weights and training."""
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
        "projection_dim": 64,
    }
    text = text_config(len(tokenizer))
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    processor = CLIPImageProcessorPil(size={"height": 128, "width": 128}, do_center_crop=False)
    return model, processor
