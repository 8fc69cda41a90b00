"""Base models with Stable Diffusion 2.1's configuration, or one derived from it, and random
weights.

The tokenizer is the toy world's, because CLIP's vocabulary is not ours to ship.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

UNET: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),  # in diffusers' SD 2 configs the number of heads
    "cross_attention_dim": 1024,
    "norm_num_groups": 32,
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE: dict[str, Any] = {
    "sample_size": 768,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
PARAMETERS = 1_290_000_000
Changes = Mapping[str, Mapping[str, Any]]


def write(
    folder: Path,
    *,
    seed: int,
    dtype: Literal["fp16", "fp32"],
    changes: Changes = MappingProxyType({}),
) -> None:
    """The pipeline's folder. Memory: the largest part alone, 1.7 GB in fp16.

    changes: to the configuration of "unet", "vae" and "text_encoder", for a smaller model.
    """
    import torch
    from diffusers import __version__

    from scripts.toy.architecture import build_scheduler, build_tokenizer
    from scripts.toy.vocabulary import vocabulary

    tokenizer = build_tokenizer(vocabulary(), folder / "tokenizer")
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    scheduler: Any = build_scheduler()
    scheduler.save_pretrained(str(folder / "scheduler"))
    for name, build in builders(tokenizer, changes).items():
        torch.manual_seed(seed)
        with default_dtype(torch.float16 if dtype == "fp16" else torch.float32):
            build().save_pretrained(str(folder / name), max_shard_size="10GB")
        gc.collect()
    empty = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None))
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": __version__}
    text = json.dumps(index | {"requires_safety_checker": False} | _CLASSES | empty, indent=2)
    (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")


def builders(
    tokenizer: Any, changes: Changes = MappingProxyType({})
) -> dict[str, Callable[[], Any]]:
    """What builds each part that has weights, changed or not. The special tokens are the
    tokenizer's own."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = TEXT_ENCODER | {key: getattr(tokenizer, key) for key in ids}
    unet, vae = {**UNET, **changes.get("unet", {})}, {**VAE, **changes.get("vae", {})}
    text |= changes.get("text_encoder", {})
    return {
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(**vae),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**text)),
    }


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    """Modules built within have this dtype from the start, so that no fp32 copy is ever held."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
