"""LoRA files, of diffusers and kohya alike, as the factors of each layer; and files of those."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.files import write_atomically
from train import adapter_metadata, kohya, lora_file
from train.adapter_file import BASE_PREDICTION
from train.adapter_math import Factors, on_base
from train.config import UserError
from train.inspection import read_json
from train.safetensors_file import read_header, shown, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from train.stored_tensors import Stored

Format = Literal["diffusers", "kohya"]
Precision = Literal["fp32", "fp16", "bf16"]
Changes = dict[str, Factors]
"""By layer, as `kohya.path_of` has it: `unet.mid_block...`, `text_encoder.text_model...`."""

FILE = "pytorch_lora_weights.safetensors"
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# What a file says of its base that its tensors do not.
_OF_BASE = (
    "ss_base_model_version",
    "ss_v2",
    "modelspec.architecture",
    "modelspec.prediction_type",
)


def read(file: Path, *, finite: bool = True) -> Changes:
    """What a LoRA file is on each layer. Raises UserError for one that cannot be read, and for
    numbers that are not finite, unless those may be."""
    from safetensors.torch import load_file

    layers = lora_file.layers(file)
    if not layers:
        raise UserError(f"{file} holds no LoRA")
    tensors = load_file(file)
    found: Changes = {}
    for name, layer in layers.items():
        kinds = {kind: tensors[tensor] for kind, tensor in layer.names.items()}
        factors = Factors(kinds["A"], kinds["B"], layer.scale, kinds.get("magnitude_vector"))
        if finite and not factors.finite:
            raise UserError(
                f"{file} is not finite in {shown(name)}: its training had diverged; give an "
                "earlier adapter"
            )
        found[kohya.path_of(name)] = factors
    return found


def plain(file: Path, changes: Changes, weights: Mapping[str, Stored] | None) -> Changes:
    """The same without DoRA's magnitudes: what they add to the base's weights.

    weights: the base's, by layer. Raises UserError for DoRA without a base, and for an adapter that
    does not fit it.
    """
    if weights is not None:
        check_fit(file, changes, weights)
        return {name: on_base(f, weights[name].read()) for name, f in changes.items()}
    dora = next((name for name, factors in changes.items() if factors.magnitude is not None), None)
    if dora is not None:
        raise UserError(
            f"{file} is a DoRA (like on {shown(dora)}): what it adds depends on its base; give "
            "base=FOLDER_OR_FILE"
        )
    return changes


def check_fit(file: Path, changes: Changes, weights: Mapping[str, Stored]) -> None:
    """Raises UserError unless the base has all layers that a file changes, as wide."""
    for name, factors in changes.items():
        shape = weights[name].shape if name in weights else None
        if shape is None or _width(shape) != _width(factors.shape):
            raise UserError(
                f"{file} does not fit base=: it changes {shown(name)} by {factors.shape}, and the "
                f"base has {shape or 'no such layer'}. Give the base it was trained on"
            )


def check_alike(files: Iterable[Path], several: Iterable[Changes]) -> None:
    """Raises UserError where files change a layer of different widths."""
    seen: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file, changes in zip(files, several, strict=True):
        for name, factors in changes.items():
            other, shape = seen.setdefault(name, (file, factors.shape))
            if _width(shape) != _width(factors.shape):
                raise UserError(
                    f"{file} and {other} are of different bases: they change {shown(name)} by "
                    f"{factors.shape} and {shape}"
                )


def _width(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the kernel of a 1x1 convolution, which some files have where others are linear."""
    return shape[:2] if set(shape[2:]) <= {1} else shape


def write(
    changes: Mapping[str, Factors],
    output: Path,
    *,
    format: Format,
    precision: Precision,
    before: Mapping[str, str] | None = None,
    scheduler: Path | None = None,
    base_prediction: str | None = None,
) -> tuple[Path, list[str]]:
    """Writes a LoRA: a folder in diffusers' format, or a file in kohya's. Returns its file, and
    what should be known of it.

    before: metadata of the file that it comes from. scheduler: folder of a scheduler_config.json
    that says how to sample with it. base_prediction: what its base predicts, if the scheduler does
    not say that yet.
    """
    import torch

    dtype = getattr(torch, _DTYPES[precision])
    is_folder = format == "diffusers"
    file = output / FILE if is_folder else output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=output.parent) as folder:
        exact, beside = Path(folder) / "exact.safetensors", Path(folder) / "scheduler"
        if scheduler is not None:
            _copy_scheduler(scheduler, beside, base_prediction)
        write_safetensors(exact, _tensors(changes), before or {})
        about = adapter_metadata.of(exact, None, name=output.stem, kind="lora")
        about |= {key: value for key, value in (before or {}).items() if key in _OF_BASE}
        writer = kohya.write_diffusers if is_folder else kohya.write
        warnings = writer(exact, file, metadata=about, dtype=dtype)
        if is_folder and beside.is_dir():
            shutil.copytree(beside, output / "scheduler", dirs_exist_ok=True)
    return file, warnings


def _copy_scheduler(scheduler: Path, folder: Path, base_prediction: str | None) -> None:
    shutil.copytree(scheduler, folder)
    if base_prediction is not None:
        file = folder / "scheduler_config.json"
        settings = read_json(file, "") | {BASE_PREDICTION: base_prediction}
        write_atomically(file, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())


def _tensors(changes: Mapping[str, Factors]) -> dict[str, Tensor]:
    import torch

    found = {}
    for name, factors in changes.items():
        found[f"{name}.lora_A.weight"] = factors.down.float()
        found[f"{name}.lora_B.weight"] = factors.up.float()
        found[f"{name}.alpha"] = torch.tensor(float(factors.alpha), dtype=torch.float32)
    return found


def common_metadata(files: Sequence[Path]) -> dict[str, str]:
    """What all files say alike of themselves."""
    first, *rest = [read_header(file).metadata for file in files]
    return {
        key: value
        for key, value in first.items()
        if key.startswith(("ss_", "modelspec.")) and all(o.get(key) == value for o in rest)
    }


def scheduler_beside(file: Path) -> Path | None:
    """The folder that says how an adapter was trained, if it has one."""
    folder = file.parent / "scheduler"
    return folder if (folder / "scheduler_config.json").is_file() else None
