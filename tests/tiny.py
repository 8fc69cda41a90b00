"""Tiny models with random weights, of the real architectures, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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

SPECIAL = ("!", "<|startoftext|>", "<|endoftext|>")


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with no merges; like SD 2's, it pads with `!`."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = letters + [letter + "</w>" for letter in letters] + list(SPECIAL[1:])
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, [], pad_token="!", model_max_length=77)


def tiny_pipeline(seed: int = 0, *, width: int = 32) -> StableDiffusionPipeline:
    """SD 2.1 in shape (linear projections, v-prediction, 4 channels at 8x), random in weights."""
    torch.manual_seed(seed)
    pipeline: Any = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(width)),
        tokenizer=tiny_tokenizer(),
        unet=_unet(width),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_clip(folder: Path, *, dimension: int = 16, side: int = 32, seed: int = 0) -> Path:
    """Save a CLIP of `dimension`-wide embeddings of `side` x `side` pixels; returns the folder."""
    torch.manual_seed(seed)
    layers: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=layers | _token_settings(),
        vision_config=layers | {"image_size": side, "patch_size": 8},
        projection_dim=dimension,
    )
    CLIPModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)
    return folder


def _token_settings() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        **_token_settings(),
    )


def _unet(width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
