"""What the user takes away, in formats other programs read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.checkpoint import sync
from train.config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.method import Method


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
        print(f"wrote {directory}")
    accelerator.wait_for_everyone()


def save_lora(unet: Any, directory: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors` (fp32) with rank and alpha in its metadata."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"the adapter is not finite ({broken[0]} and {len(broken) - 1} more): training "
            "diverged; lower optim.learning_rate"
        )
    # diffusers leaves loaded adapters in training mode: a dropout named here would act when
    # generating.
    settings = unet.peft_config["default"].to_dict() | {"lora_dropout": 0.0, "inference_mode": True}
    # PEFT keeps names in sets, whose order differs from process to process: the file should not.
    metadata = {k: sorted(v) if isinstance(v, set | list) else v for k, v in settings.items()}
    StableDiffusionPipeline.save_lora_weights(
        save_directory=str(directory),
        unet_lora_layers={name: tensor.detach().cpu() for name, tensor in state.items()},
        unet_lora_adapter_metadata=metadata,
    )
    for file in directory.glob("*.safetensors"):
        _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """safetensors writes the entries of a file's metadata in an order that differs from process to
    process; a hash of the file should not."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def save_pipeline(pipeline: Any, directory: Path) -> None:
    """Writes the whole pipeline as a diffusers folder."""
    pipeline.save_pretrained(str(directory), safe_serialization=True)
