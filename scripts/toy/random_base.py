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

from train.architecture import TEXT_ENCODER, UNET, VAE

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
