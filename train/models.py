"""Base models: loading a pipeline's parts, and what is done with each."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import recomputing
from train.config import DiffusionConfig, ModelConfig, RunConfig, TrainConfig, UserError
from train.families import BaseModel, Family, detect, family_of
from train.inspection import from_hub, inspect, read_json

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from train.method import Pipeline

_DEPTH_PARTS = ("depth_estimator", "feature_extractor")
_NEVER_SAMPLE = {  # schedulers of diffusers that cannot step what a model says of the picture
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
}

_WINDOWS = 8  # of 77 tokens, encoded at once


def fp32_bytes(base: BaseModel) -> int:
    """Upper estimate of a base's size in fp32, from its files (fp16 at the least) or as SD
    2.1's."""
    return 2 * base.weight_bytes if base.weight_bytes else 4 * 1_290_000_000


def load_pipeline(
    path: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """The whole base on the CPU as the diffusers pipeline of its family, safetensors only.

    Without safety checker, and for a depth model without depth estimator: depth maps are files
    here. config: for a single file, whose configuration to take. dtype: of all parts; default fp32.
    Its `described_in` is the folder or hub id, and the revision, of its configuration. Raises
    UserError where the weights cannot be had.
    """
    import torch

    from train import single_file

    base = inspect(ModelConfig(path=path, revision=revision, config=config))
    dtype = dtype or torch.float32
    if Path(path).is_file():
        config = single_file.configuration(Path(path), config, base.family)
        pipeline = single_file.load(Path(path), base.family, config=config, dtype=dtype)
        pipeline.described_in = (config, None)
        source = f"model.config={config}"
    else:
        pipeline = _from_folder(path, revision, base.family, dtype)
        pipeline.described_in = (path, revision)
        source = f"model.path={path}"
    detect(path, dict(pipeline.unet.config), pipeline.text_encoder.config.to_dict())
    _check_tokenizer(pipeline.tokenizer, source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _from_folder(path: str, revision: str | None, family: Family, dtype: torch.dtype) -> Pipeline:
    import diffusers

    without = dict.fromkeys(_DEPTH_PARTS)
    if not family.depth:
        without = {"safety_checker": None, "feature_extractor": None}
    options: dict[str, Any] = {} if family.depth else {"requires_safety_checker": False}
    try:
        return getattr(diffusers, family.pipeline).from_pretrained(
            path, revision=revision, use_safetensors=True, dtype=dtype, **without, **options
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
    """The base of a training run: frozen, in fp32, its encoders on the accelerator's device. The
    UNet waits on the CPU while they are at work (train/resting.py).

    What the configuration overrides reaches the scheduler, so that previews and exports sample as
    was trained; the checkpoint's own stays beside it as `base_scheduler`.
    """
    model = config.model
    pipeline = load_pipeline(model.path, revision=model.revision, config=model.config)
    pipeline.base_scheduler = pipeline.scheduler
    pipeline.scheduler = reschedule(pipeline.scheduler, config.diffusion)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    recomputing.enable(pipeline, config.train.gradient_checkpointing)
    for module in (pipeline.vae, pipeline.text_encoder):
        module.to(accelerator.device)
    return pipeline


def reschedule(scheduler: Any, config: DiffusionConfig) -> Any:
    """A checkpoint's scheduler with the prediction type and zero terminal SNR of the configuration.

    Zero terminal SNR also makes sampling begin at the last timestep (Lin et al. 2023, sections 3.1
    and 3.3). DDIM takes the place of a scheduler that does not know what is asked of it. Raises
    UserError for zero terminal SNR of a model that predicts epsilon.
    """
    import diffusers

    kind: Any = type(scheduler)
    changes: dict[str, Any] = {}
    if config.prediction_type:
        changes["prediction_type"] = config.prediction_type
        if config.prediction_type == "sample" and kind.__name__ in _NEVER_SAMPLE:
            kind = diffusers.DDIMScheduler
    if config.zero_terminal_snr:
        check_zero_snr(config.prediction_type or scheduler.config.prediction_type)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in signature(kind).parameters:
            kind = diffusers.DDIMScheduler
    return converted(scheduler, kind, **changes) if changes else scheduler


def converted(scheduler: Any, kind: Any, **changes: Any) -> Any:
    """A scheduler of class `kind` on the schedule of another, with `changes` to its settings."""
    # The default of DDIM and DDPM clips the picture that they predict to [-1, 1], and latents go
    # beyond.
    changes["clip_sample"] = scheduler.config.get("clip_sample", False)
    return kind.from_config(scheduler.config, **changes)


def check_zero_snr(prediction_type: str) -> None:
    """Raises UserError for what cannot be trained or sampled at zero terminal SNR."""
    if prediction_type == "epsilon":
        raise UserError(
            "diffusion.zero_terminal_snr=true: the base predicts epsilon, and at zero SNR the "
            "noise tells nothing of the picture. Use a base that predicts v (SD 2.1), or leave it "
            "out"
        )


def add_depth_estimator(pipeline: Pipeline, directory: Path) -> None:
    """Completes the folder that a depth pipeline was saved to with the depth estimator of its base,
    which was not loaded, so that diffusers can load it as it stands.

    Prints a note where there is none: diffusers then wants to be told so, and a `depth_map` for
    each picture.
    """
    if not family_of(pipeline).depth:
        return
    try:
        base, parts = _depth_estimator(*pipeline.described_in)
    except UserError as error:
        print(
            f"note     {directory} has no depth estimator ({error}). Load it with from_pretrained("
            "FOLDER, depth_estimator=None, feature_extractor=None), and give a depth_map",
            flush=True,
        )
        return
    for part in _DEPTH_PARTS:
        (directory / part).mkdir()
        for file in _safe_files(base / part):
            shutil.copyfile(file, directory / part / file.name)
    index = directory / "model_index.json"
    complete = read_json(index, "not a diffusers folder?") | parts
    index.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")


def _depth_estimator(path: str, revision: str | None) -> tuple[Path, dict[str, list[str]]]:
    """The folder of a base with its depth estimator, and what model_index.json has to say of that.
    Raises UserError where it has none in safetensors."""
    base = Path(path)
    if not base.is_dir():
        wanted = [f"{part}/*.{end}" for part in _DEPTH_PARTS for end in ("json", "safetensors")]
        base = from_hub(path, revision, ["model_index.json", *wanted])
    index = read_json(base / "model_index.json", "not a diffusers folder?")
    parts = {}
    for part, end in zip(_DEPTH_PARTS, (".safetensors", ".json"), strict=True):
        match index.get(part):
            case [str(library), str(name)] if end in {f.suffix for f in _safe_files(base / part)}:
                # Which was the image processor's name before transformers 5.
                parts[part] = [library, name.replace("FeatureExtractor", "ImageProcessor")]
            case _:
                raise UserError(f"{base} has no {part}, or not as safetensors")
    return base, parts


def _safe_files(folder: Path) -> list[Path]:
    """Without pickles and variants."""
    patterns = ("*.json", "model.safetensors", "model-*-of-*.safetensors")
    return [file for pattern in patterns for file in folder.glob(pattern)]


def store_in(pipeline: Pipeline, config: TrainConfig, device: torch.device | None = None) -> None:
    """Keeps frozen weights as the forward pass wants them: in its precision, at half the memory,
    and laid out as its kernels read them; the UNet's linear layers in 8 or 4 bits, if asked. The
    UNet comes to the `device`, if one is given, only then.

    Comes after caching, which is done in fp32, and before anything is made to train.
    """
    import torch

    from train import quantising

    layout = torch.channels_last if config.channels_last else torch.preserve_format
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        if module is pipeline.unet and config.quantize != "none":
            quantising.quantise(module, config.quantize)  # of the weights in fp32
        module.to(dtype=dtype_of(config.mixed_precision), memory_format=layout)
    if device is not None:
        pipeline.unet.to(device)


def dtype_of(precision: str) -> torch.dtype:
    """What no or fp32, bf16 and fp16 mean."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return known["fp32" if precision == "no" else precision]


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


def latent_encoder(vae: Any, precision: str = "fp32") -> Callable[[torch.Tensor], torch.Tensor]:
    """pixels (B, 3, H, W) in [-1, 1] -> the posterior's mean and log-variance (B, 8, H/8, W/8),
    fp32, on the VAE's device, where they may still be in the making.

    precision: fp32 is the VAE as it is; bf16 encodes with a copy of it in bf16, the channels
    innermost.
    """
    import torch

    if precision != "fp32":
        vae = copy.deepcopy(vae, {id(vae.decoder): None})  # which is not needed
        vae = vae.to(dtype=dtype_of(precision), memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        if vae.device.type == "cuda":
            pixels = pixels.pin_memory().to(vae.device, non_blocking=True)
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters.float()

    return encode


def latent_fingerprint(vae: nn.Module, precision: str = "fp32") -> str:
    """What latents that `latent_encoder` makes are known by."""
    made_by = fingerprint(vae)
    return made_by if precision == "fp32" else f"{made_by}-{precision}"


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
