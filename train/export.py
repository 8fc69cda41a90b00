"""What the user takes away, in formats other programs read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import adapters
from train.adapter_file import BASE_PREDICTION
from train.checkpoint import sync
from train.config import UserError
from train.safetensors_file import in_order

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from train.method import Method, Pipeline


def publish(method: Method, directory: Path, accelerator: Accelerator) -> None:
    """Exports on the main process: the directory appears complete or not at all."""
    if accelerator.is_main_process:
        temporary = directory.with_name(f".writing-{directory.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        method.export(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)
        sync(directory.parent)
    accelerator.wait_for_everyone()


def save_lora(pipeline: Pipeline, directory: Path) -> None:
    """Writes the adapters of `adapters.attach`, the UNet's and the text encoder's, as
    `pytorch_lora_weights.safetensors` (fp32) with their ranks and alphas in its metadata."""
    from diffusers import StableDiffusionPipeline

    contents: dict[str, Any] = {}
    for part in adapters.PARTS:
        model = getattr(pipeline, part)
        if adapters.NAME in getattr(model, "peft_config", {}):
            layers = _lora_layers(model)
            contents[f"{part}_lora_layers"] = {_name(n, part): t for n, t in layers.items()}
            contents[f"{part}_lora_adapter_metadata"] = _settings(model)
    StableDiffusionPipeline.save_lora_weights(save_directory=str(directory), **contents)
    for file in directory.glob("pytorch_lora_weights*.safetensors"):
        _sort_metadata(file)


def _lora_layers(model: Any) -> dict[str, Tensor]:
    """An adapter's tensors, on the CPU. Raises UserError where one is not finite."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(
        model, adapter_name=adapters.NAME, save_embedding_layers=False
    )
    _refuse_non_finite(state, "the adapter")
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _refuse_non_finite(state: Mapping[str, Tensor], what: str) -> None:
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{what} is not finite ({broken[0]} and {len(broken) - 1} more): training diverged; "
            "lower optim.learning_rate"
        )


def _name(name: str, part: str) -> str:
    """What a tensor is called in the file. The text encoder's have the `text_model.` that CLIP's
    had before transformers 5, which other programs expect, and DoRA's magnitudes their whole name,
    without which transformers 5 does not find them."""
    if part == "unet":
        return name
    end = ".weight" if name.endswith("lora_magnitude_vector") else ""
    return f"text_model.{name.removeprefix('text_model.')}{end}"


def _settings(model: Any) -> dict[str, Any]:
    """An adapter's settings as whoever generates should have them."""
    # diffusers leaves loaded adapters in training mode: a dropout named here would act when
    # generating.
    settings = model.peft_config[adapters.NAME].to_dict() | {
        "lora_dropout": 0.0,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    # PEFT keeps names in sets, whose order differs from process to process: the file should not.
    return {k: sorted(v) if isinstance(v, set | list) else v for k, v in settings.items()}


def save_scheduler(pipeline: Pipeline, directory: Path) -> None:
    """Writes `scheduler/scheduler_config.json`: an adapter is used with the prediction type and the
    terminal SNR that it was trained with. Whatever its base predicts by itself stands there too,
    so that one of another kind is told from an override."""
    pipeline.scheduler.save_pretrained(str(directory / "scheduler"))
    file = directory / "scheduler" / "scheduler_config.json"
    base = getattr(pipeline, "base_scheduler", pipeline.scheduler)
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings[BASE_PREDICTION] = base.config.prediction_type
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sort_metadata(file: Path) -> None:
    file.write_bytes(in_order(file.read_bytes()))


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Writes the whole pipeline as a diffusers folder; of a depth model with its base's depth
    estimator. Raises UserError where a weight is not finite."""
    from train.models import add_depth_estimator

    for part in ("unet", "text_encoder", "vae"):
        _refuse_non_finite(getattr(pipeline, part).state_dict(), f"the {part}")
    pipeline.save_pretrained(str(directory), safe_serialization=True)
    add_depth_estimator(pipeline, directory)
