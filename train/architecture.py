"""The shape of a base model without its weights: from its config.json, or assumed to be Stable
Diffusion 2.1's. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ModelConfig, UserError
from train.inspection import read_json, weight_files
from train.safetensors_file import read_header

if TYPE_CHECKING:
    from torch import nn

WEIGHTED = ("unet", "vae", "text_encoder")
LATENT_CHANNELS = 4

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
    "latent_channels": LATENT_CHANNELS,
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
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"  # of a single file's UNet
_SD21: dict[str, dict[str, Any]] = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}


@dataclass(frozen=True)
class Architecture:
    """What a base is made of."""

    parts: Mapping[str, dict[str, Any]]
    """The configuration of the UNet, the VAE and the text encoder, in the order of loading."""
    widths: Mapping[str, int]
    """Bytes of one number in each part's files."""
    prediction_type: str
    described: str
    """Where this is from, in words."""

    @classmethod
    def of(cls, model: ModelConfig) -> Architecture:
        """A base's own where its config.json is on this machine, or else SD 2.1's. Raises UserError
        for a folder that is no base."""
        folder = _folder_of(model)
        if folder is None:
            return _assumed(model)
        index = read_json(folder / "model_index.json", "not a diffusers folder?")
        order = [part for part in index if part in WEIGHTED]
        if set(order) != set(WEIGHTED):
            raise UserError(f"model.path={folder}: model_index.json lacks one of {WEIGHTED}")
        scheduler = read_json(folder / "scheduler/scheduler_config.json", "no configuration")
        return cls(
            {part: _config(folder, part) for part in order},
            {part: _width(folder, part) for part in order},
            str(scheduler.get("prediction_type", "epsilon")),
            f"sizes of {folder}",
        )

    @property
    def channels(self) -> int:
        """Of the UNet's input."""
        return int(self.parts["unet"].get("in_channels", LATENT_CHANNELS))

    @property
    def text_width(self) -> int:
        """Numbers of a token's embedding."""
        return int(self.parts["text_encoder"].get("hidden_size", 512))

    @property
    def latent_channels(self) -> int:
        return int(self.parts["vae"].get("latent_channels", LATENT_CHANNELS))

    def numbers(self) -> int:
        """How many all parts have together."""
        import torch

        with torch.device("meta"):
            parts = [self.build(part) for part in self.parts]
        return sum(p.numel() for part in parts for p in part.parameters())

    def build(self, part: str) -> nn.Module:
        """A part as it is loaded for training: frozen, fp32, at rest. On the meta device or among
        fake tensors it takes no memory."""
        module = _built(part, self.parts[part])
        return module.requires_grad_(False).eval()


def _assumed(model: ModelConfig) -> Architecture:
    why = f"{model.path} is not on this machine: SD 2.1's sizes are assumed"
    order = ("text_encoder", "unet", "vae")
    parts = {part: _SD21[part] for part in order}
    if Path(model.path).is_file():
        why = f"SD 2.1's sizes are assumed for the single file {model.path}"
        first = read_header(Path(model.path)).tensors.get(_FIRST)
        if first is not None and len(first.shape) == 4:
            parts["unet"] = UNET | {"in_channels": first.shape[1]}
    return Architecture(parts, dict.fromkeys(order, 4), "v_prediction", why)


def _folder_of(model: ModelConfig) -> Path | None:
    """The folder of its JSON, where that is on this machine."""
    for path in (model.path, model.config):
        if path and Path(path).is_dir():
            return Path(path)
        if path and not Path(path).exists() and path.count("/") == 1:
            cached = _cached(path, model.revision)
            if cached is not None:
                return cached
    return None


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    files = [f"{part}/config.json" for part in WEIGHTED]
    files += ["scheduler/scheduler_config.json", "model_index.json"]
    try:
        found = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    except ValueError:  # no name that the hub could have
        return None
    there = [Path(file) for file in found if isinstance(file, str)]
    return there[-1].parent if len(there) == len(files) else None


def _config(folder: Path, part: str) -> dict[str, Any]:
    return read_json(folder / part / "config.json", f"{part} has no configuration")


def _width(folder: Path, part: str) -> int:
    """Bytes of a number in the part's files; 4 where they are not there yet."""
    try:
        files = weight_files(folder, part)
    except UserError:
        return 4
    stored = [entry for file in files for entry in read_header(file).tensors.values()]
    numbers = sum(prod(entry.shape) for entry in stored)
    return round(sum(entry.last - entry.first for entry in stored) / max(numbers, 1)) or 4


def _built(part: str, config: dict[str, Any]) -> Any:
    if part == "text_encoder":
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**_without_classes(config)))
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind: Any = UNet2DConditionModel if part == "unet" else AutoencoderKL
    return kind.from_config(config)


def _without_classes(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("architectures", "model_type", "dtype")}
