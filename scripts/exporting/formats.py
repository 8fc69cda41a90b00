"""Writing an export: whole or not at all, with its card and its pictures."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.exporting import card as cards
from scripts.exporting import placing
from scripts.exporting.card import Card, Sample
from scripts.exporting.results import Result
from train.adapter_file import LORA
from train.config import ModelConfig, UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Export:
    """What was written, by the names it has in a repository, and what should be known of it."""

    files: dict[str, Path]
    warnings: list[str]


def export(
    result: Result,
    format: str,
    output: Path,
    *,
    precision: str,
    scale: float,
    card: bool,
    overwrite: bool,
) -> Export:
    """Writes `result` to `output`, a file or a folder, with its card beside or in it. Raises
    UserError; what was there before then stays."""
    from safetensors import SafetensorError

    from train.models import dtype_of

    dtype = dtype_of(precision)
    samples = cards.samples(result.run) if card else []
    about = Card(result, format, scale, output.name, samples)
    try:
        with placing.place(output, format, overwrite=overwrite) as temporary:
            warnings = _WRITERS[format](result, temporary, dtype, scale)
            if card and temporary.is_dir():
                about.write(temporary / "README.md", temporary / "images")
            elif card:
                about.write(temporary.with_suffix(".md"), placing.pictures(temporary))
                _thumbnail(temporary.with_suffix(".png"), samples)
    except (OSError, SafetensorError) as error:
        raise UserError(f"output={output} cannot be written ({error})") from None
    return Export(placing.files(output, format), warnings)


def _thumbnail(path: Path, samples: Sequence[Sample]) -> None:
    """The picture that web UIs show for a file."""
    if samples:
        shutil.copyfile(samples[0].picture, path)


# The formats


def _diffusers(result: Result, output: Path, dtype: torch.dtype, _: float) -> list[str]:
    from train import adapter_metadata, kohya

    if result.is_model:
        return _merged(result, output, dtype, 1.0)
    output.mkdir()
    for file in result.embeddings:
        its = adapter_metadata.of(file, result.run, name=result.name, kind="textual-inversion")
        _written_embedding(file, output / cards.embedding_name(file), dtype, its)
    if (result.folder / "scheduler").is_dir():
        shutil.copytree(result.folder / "scheduler", output / "scheduler")
    if result.lora is None:
        return []
    about = adapter_metadata.of(result.lora, result.run, name=result.name, kind="lora")
    return kohya.write_diffusers(result.lora, output / LORA, metadata=about, dtype=dtype)


def _written_embedding(file: Path, output: Path, dtype: torch.dtype, about: dict[str, str]) -> None:
    """Under its word. Raises UserError for numbers that are not finite, or are not in `dtype`."""
    from safetensors.torch import load_file

    from train import adapter_metadata
    from train.adapter_file import EMBEDDING

    tensors = {}
    for name, rows in load_file(file).items():
        word = file.stem if name == EMBEDDING else name
        tensors[word] = rows.to(dtype)
        if not tensors[word].isfinite().all():
            raise UserError(f"{file}: {word} is not finite in {dtype}; use precision=fp32")
    adapter_metadata.write(output, tensors, about)


def _kohya(result: Result, output: Path, dtype: torch.dtype, _: float) -> list[str]:
    from train import adapter_metadata, kohya

    file = Path(result.adapters[0])
    about = adapter_metadata.of(file, result.run, name=result.name, kind=result.kind)
    write = kohya.write if result.lora else kohya.write_embedding
    return write(file, output, metadata=about, dtype=dtype)


def _merged(result: Result, output: Path, dtype: torch.dtype, scale: float) -> list[str]:
    from train import merging

    base = ModelConfig(path=str(result.folder)) if result.is_model else result.base
    assert base is not None
    merging.merged_folder(base, _scaled(result, scale), output, dtype)
    return []


def _scaled(result: Result, scale: float) -> list[str]:
    """The adapters as `adapters` takes them, the LoRA at its scale."""
    lora = [f"{result.lora}:{scale}"] if result.lora else []
    return [*map(str, result.embeddings), *lora]


def _single_file(result: Result, output: Path, dtype: torch.dtype, scale: float) -> list[str]:
    import torch

    from train import adapter_metadata, ldm

    about = adapter_metadata.of(None, result.run, name=result.name, kind="model")
    base = Path(result.base.path) if result.base else None
    source = base if base and base.suffix == ".safetensors" else None
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=output.parent) as scratch:
        folder = result.folder
        if not result.is_model:
            folder = Path(scratch) / "merged"
            _merged(result, folder, torch.float32, scale)
        return ldm.to_single_file(folder, output, dtype=dtype, metadata=about, source=source)


_WRITERS = {
    "diffusers": _diffusers,
    "kohya": _kohya,
    "merged": _merged,
    "single_file": _single_file,
}
