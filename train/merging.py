"""Adapters in a base's own weights: a plain pipeline, that needs no PEFT and takes no adapter's
time.

What is added is computed in fp32, whatever precision the result is stored in, and as PEFT's layers
compute it: the scale counts, DoRA's norms are those of the base's weights without the other
adapters, and several act in the order in which they are given.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import adapter_file, new_tokens
from train.adapter_file import Adapter
from train.config import ModelConfig, UserError
from train.inspection import inspect

if TYPE_CHECKING:
    import torch

    from train.method import Pipeline

_PARTS = ("unet", "text_encoder")


def merged_folder(
    base: ModelConfig, adapters: Sequence[str], output: Path, dtype: torch.dtype
) -> None:
    """Writes a base with adapters in its weights as a diffusers folder.

    base: a folder, single file or hub id of SD 1 or 2. adapters: LoRA or embedding folders or
    files, of a LoRA each `path` or `path:scale`; new words come into the tokenizer and the text
    encoder's table. The scheduler is what they were trained with. output: absent or empty; it
    appears whole or not at all. dtype: of the weights that are written; the memory is that of the
    base in fp32. Raises UserError for adapters that do not fit the base, and numbers that are not
    finite.
    """
    found = [adapter_file.find(text) for text in adapters]
    _check(base, found, output)
    pipeline = _with_adapters(base, found)
    fuse(pipeline)
    convert(pipeline, dtype)
    _save(pipeline, output)


def _check(base: ModelConfig, adapters: Sequence[Adapter], output: Path) -> None:
    """What can be wrong, before anything heavy is loaded."""
    from train.models import fp32_bytes
    from train.rundir import check_space

    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"output={output} is not an empty folder; give another one")
    known = inspect(base)
    adapter_file.check_prediction(adapters, known.prediction_type)
    folder = Path(base.path)
    if folder.is_dir():
        words = new_tokens.words_of(folder / "tokenizer")
        adapter_file.check(adapters, adapter_file.folder_shapes(folder), words)
    for file in (file for adapter in adapters for file in adapter.files):
        _refuse_non_finite(file)
    check_space(output, fp32_bytes(known), what="the merged model")


def _refuse_non_finite(file: Path) -> None:
    from train import stored_tensors

    for name, stored in stored_tensors.of_files([file]).items():
        if not stored.read().isfinite().all():
            raise UserError(
                f"adapters={file} is not finite in {name}: its training had diverged; give an "
                "earlier adapter"
            )


def _with_adapters(base: ModelConfig, adapters: Sequence[Adapter]) -> Pipeline:
    """The base in fp32 with its adapters beside its weights."""
    from train.models import load_pipeline

    pipeline = load_pipeline(base.path, revision=base.revision, config=base.config)
    words = pipeline.tokenizer.get_vocab()
    adapter_file.check(adapters, adapter_file.pipeline_shapes(pipeline), words)
    adapter_file.apply(pipeline, adapters)
    return pipeline


def fuse(pipeline: Any) -> None:
    """Adds the active adapters of a pipeline, each at its scale, to the weights of its UNet and
    text encoder, and removes PEFT's layers.

    In fp32; layers that were stored in less are rounded once, after all of their adapters. Raises
    UserError where a weight would not be finite.
    """
    for part in _PARTS:
        for name, layer in _adapted(getattr(pipeline, part)).items():
            _fuse(f"{part}.{name}", layer)
    pipeline.unload_lora_weights()


def _adapted(model: Any) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _fuse(name: str, layer: Any) -> None:
    import torch

    base = layer.get_base_layer()
    dtype = base.weight.dtype
    with torch.no_grad():
        layer.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(
                f"{name} is not finite with its adapters ({error}): lower the scale, or give an "
                "earlier adapter"
            ) from None
        base.to(dtype)


def convert(pipeline: Any, dtype: torch.dtype) -> None:
    """Stores all parts in a precision. Raises UserError where a number does not fit it."""
    for part in (*_PARTS, "vae"):
        model = getattr(pipeline, part)
        model.to(dtype)
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{part}.{name} does not fit {str(dtype).removeprefix('torch.')}, or is not "
                    "finite in the base: use bf16 or fp32"
                )


def _save(pipeline: Pipeline, output: Path) -> None:
    from train.export import save_pipeline

    temporary = output.with_name(f".writing-{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_pipeline(pipeline, temporary)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
