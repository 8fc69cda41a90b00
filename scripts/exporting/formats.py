"""Writing an export: whole or not at all, with its card and its pictures."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.exporting import card as cards
from scripts.exporting.card import Sample
from scripts.exporting.results import Result
from train.config import UserError

if TYPE_CHECKING:
    import torch

LORA = "pytorch_lora_weights.safetensors"
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export(
    result: Result, format: str, output: Path, *, precision: str, scale: float, card: bool
) -> list[str]:
    """Writes `result` to `output`, a file or a folder, with its card beside or in it; returns what
    should be known of it. Raises UserError; what was at `output` before then stays."""
    import torch

    dtype = getattr(torch, _DTYPES[precision])
    samples = cards.samples(result.run) if card else []
    try:
        with _placed(output) as temporary:
            warnings = _WRITERS[format](result, temporary, dtype, scale)
            if card and temporary.is_dir():
                cards.write(temporary / "README.md", result, format, "", samples)
        if card and output.is_file():
            _beside(output, result, format, samples)
    except OSError as error:
        raise UserError(f"output={output} cannot be written ({error})") from None
    return warnings


def files_of(output: Path) -> dict[str, Path]:
    """What belongs to an export by its name in a repository."""
    if output.is_dir():
        files = sorted(path for path in output.rglob("*") if path.is_file())
        return {str(path.relative_to(output)): path for path in files}
    pictures = sorted(_pictures(output).glob("*.png"))
    named = {f"{path.parent.name}/{path.name}": path for path in pictures}
    card, settings = output.with_suffix(".md"), output.with_suffix(".yaml")
    beside = {"README.md": card, settings.name: settings}
    return {
        output.name: output,
        **{name: path for name, path in beside.items() if path.is_file()},
        **named,
    }


def _beside(output: Path, result: Result, format: str, samples: Sequence[Sample]) -> None:
    """The card, its pictures, and the picture that web UIs show for a file."""
    cards.write(output.with_suffix(".md"), result, format, output.name, samples, _pictures(output))
    if samples:
        shutil.copyfile(samples[0].picture, output.with_suffix(".png"))


def _pictures(output: Path) -> Path:
    return output.with_name(f"{output.stem}-images")


@contextmanager
def _placed(output: Path) -> Iterator[Path]:
    """A place to write to, which is `output` once all is on the disk, and gone if that fails. What
    is written beside it comes along."""
    from train.checkpoint_files import sync

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=output.parent) as folder:
        temporary = Path(folder) / output.name
        yield temporary
        for path in Path(folder).rglob("*"):
            sync(path)
        beside = [path for path in Path(folder).iterdir() if path != temporary]
        if output.is_dir():
            os.replace(output, Path(folder) / "replaced")
        for path in [*beside, temporary]:
            os.replace(path, output.with_name(path.name))
        sync(output.parent)


# The formats


def _diffusers(result: Result, output: Path, dtype: torch.dtype, _: float) -> list[str]:
    from train import adapter_metadata, kohya

    if result.is_model:
        return _copied_model(result.folder, output, dtype)
    output.mkdir()
    for file in result.embeddings:
        _copied_embedding(file, output / file.name, dtype)
    if (result.folder / "scheduler").is_dir():
        shutil.copytree(result.folder / "scheduler", output / "scheduler")
    if result.lora is None:
        return []
    about = adapter_metadata.of(result.lora, result.run, name=result.name, kind="lora")
    return kohya.write_diffusers(result.lora, output / LORA, metadata=about, dtype=dtype)


def _copied_embedding(file: Path, output: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    from train.safetensors_file import read_header, write_safetensors

    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    write_safetensors(output, tensors, read_header(file).metadata)


def _copied_model(folder: Path, output: Path, dtype: torch.dtype) -> list[str]:
    from train import export
    from train.models import load_pipeline

    export.save_pipeline(load_pipeline(str(folder), dtype=dtype), output)
    return []


def _kohya(result: Result, output: Path, dtype: torch.dtype, _: float) -> list[str]:
    from train import adapter_metadata, kohya

    file = Path(result.adapters[0])
    about = adapter_metadata.of(file, result.run, name=result.name, kind=result.kind)
    write = kohya.write if result.lora else kohya.write_embedding
    return write(file, output, metadata=about, dtype=dtype)


def _merged(result: Result, output: Path, dtype: torch.dtype, scale: float) -> list[str]:
    from train import merging

    if result.is_model:
        return _copied_model(result.folder, output, dtype)
    assert result.base is not None
    merging.merged_folder(result.base, _scaled(result, scale), output, dtype)
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
