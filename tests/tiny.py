"""Tiny models with random weights, of the real architectures, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
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
FamilyName = Literal["sd21", "sd21-base", "sd2-depth", "sd2-inpainting", "sd15"]
FAMILIES: tuple[FamilyName, ...] = ("sd21", "sd21-base", "sd2-depth", "sd2-inpainting", "sd15")


def tiny_tokenizer(pad: str = "!") -> CLIPTokenizer:
    """CLIP's byte-level tokenizer with no merges; like SD 2's, it pads with `!`."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = letters + [letter + "</w>" for letter in letters] + list(SPECIAL[1:])
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, [], pad_token=pad, model_max_length=77)


def tiny_pipeline(seed: int = 0, *, width: int = 32, family: FamilyName = "sd21") -> Any:
    """A family in shape, random in weights: SD 2.1 with linear projections and v-prediction, 4
    channels at 8x; or another, that predicts epsilon."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "vae": _vae(),
        "text_encoder": CLIPTextModel(_text_config(width)),
        "tokenizer": tiny_tokenizer("<|endoftext|>" if family == "sd15" else "!"),
        "unet": _unet(
            width,
            channels={"sd2-depth": 5, "sd2-inpainting": 9}.get(family, 4),
            linear=family != "sd15",
            side=None if family == "sd21" else 8,
        ),
        "scheduler": _scheduler() if family == "sd21" else _epsilon_scheduler(),
        "feature_extractor": None,
    }
    pipeline: Any
    if family == "sd2-depth":
        pipeline = StableDiffusionDepth2ImgPipeline(**parts, depth_estimator=None)
    else:
        inpainting = family == "sd2-inpainting"
        kind = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
        pipeline = kind(**parts, safety_checker=None, requires_safety_checker=False)
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


def _unet(
    width: int, *, channels: int = 4, linear: bool = True, side: int | None = None
) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        use_linear_projection=linear,
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


def _epsilon_scheduler() -> PNDMScheduler:
    """As the checkpoints have it that predict epsilon."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
