"""LoRA files, of diffusers and kohya alike, as the factors of each layer; and files of those."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.files import move_together, write_atomically
from train import adapter_metadata, kohya, lora_file
from train.adapter_file import BASE_PREDICTION
from train.adapter_file import LORA as FILE
from train.adapter_math import Factors, on_base
from train.config import UserError
from train.inspection import read_json
from train.safetensors_file import read_header, shown, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from train.stored_tensors import Stored

Format = Literal["diffusers", "kohya"]
Precision = Literal["fp32", "fp16", "bf16"]
Changes = Mapping[str, Factors]
"""By layer, as `kohya.path_of` has it: `unet.mid_block...`, `text_encoder.text_model...`."""

_SCHEDULER = "scheduler/scheduler_config.json"
_NAMED = 3  # files that an error names
# What a file says of its base that its tensors do not.
_OF_BASE = (
    "ss_base_model_version",
    "ss_v2",
    "modelspec.architecture",
    "modelspec.prediction_type",
)


class Made(Changes):
    """Changes that are made of others when they are asked for, each time, and not kept: of DoRA
    those of all layers are larger than the model."""

    def __init__(self, changes: Changes, make: Callable[[str, Factors], Factors]) -> None:
        self._changes = changes
        self._make = make

    def __getitem__(self, name: str) -> Factors:
        return self._make(name, self._changes[name])

    def __contains__(self, name: object) -> bool:
        return name in self._changes  # Mapping's own would make it

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def read(file: Path, *, finite: bool = True) -> dict[str, Factors]:
    """What a LoRA file is on each layer. Raises UserError for one that cannot be read, and for
    numbers that are not finite, unless those may be."""
    from safetensors.torch import load_file

    layers = lora_file.layers(file)
    if not layers:
        raise UserError(f"{file} holds no LoRA")
    tensors = load_file(file)
    found: dict[str, Factors] = {}
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
    """The same without DoRA's magnitudes: what they add to the base's weights, made a layer at a
    time when it is asked for.

    weights: the base's, by layer. Raises UserError for DoRA without a base, and for an adapter that
    does not fit it.
    """
    if weights is not None:
        check_fit(file, changes, weights)
        return Made(changes, lambda name, factors: _on_base(factors, weights[name]))
    dora = _dora_in(changes)
    if dora is not None:
        raise UserError(
            f"{file} is a DoRA (like on {shown(dora)}): what it adds depends on its base; give "
            "base=FOLDER_OR_FILE"
        )
    return changes


def _on_base(factors: Factors, weight: Stored) -> Factors:
    return factors if factors.magnitude is None else on_base(factors, weight.read())


def _dora_in(changes: Changes) -> str | None:
    """A layer that has DoRA's magnitudes, if one has."""
    return next((n for n, factors in changes.items() if factors.magnitude is not None), None)


def check_low_rank(files: Iterable[Path], several: Iterable[Changes]) -> None:
    """Raises UserError for DoRA: what it adds is of its layers' full rank, so that a file of all of
    it would be larger than the model."""
    for file, changes in zip(files, several, strict=True):
        dora = _dora_in(changes)
        if dora is not None:
            raise UserError(
                f"{file} is a DoRA (like on {shown(dora)}): what it adds is of full rank, and an "
                "exact merge would be larger than the model; give rank= or energy=, with base="
            )


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


def check_replaceable(output: Path) -> None:
    """Raises UserError for a folder with more in it than `write` makes, and for a file that is no
    LoRA: what would be lost is not an earlier output."""
    if output.is_dir():
        inside = [*output.iterdir(), *(output / "scheduler").glob("*")]
        ours = {FILE, "scheduler", _SCHEDULER}
        others = sorted({str(path.relative_to(output)) for path in inside} - ours)
        if others:
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            raise UserError(
                f"output={output} also holds {', '.join(map(shown, others[:_NAMED]))}{more}, which "
                "overwrite=true would delete: move that away, or choose another folder"
            )
    elif output.exists() and not _is_lora(output):
        raise UserError(f"output={output} is no LoRA, and is not overwritten: choose another")


def _is_lora(file: Path) -> bool:
    try:
        names = read_header(file).tensors
    except UserError:
        return False
    return lora_file.is_kohya(names) or any(".lora" in name for name in names)


def write(
    changes: Changes,
    output: Path,
    *,
    format: Format,
    precision: Precision,
    before: Mapping[str, str] | None = None,
    scheduler: Path | None = None,
    base_prediction: str | None = None,
) -> tuple[Path, list[str]]:
    """Writes a LoRA: a folder in diffusers' format, or a file in kohya's, in place of an earlier
    one. Returns its file, and what should be known of it. Raises as `check_replaceable`.

    before: metadata of the file that it comes from. scheduler: folder of a scheduler_config.json
    that says how to sample with it. base_prediction: what its base predicts, if the scheduler does
    not say that yet.
    """
    from train.models import dtype_of

    dtype = dtype_of(precision)
    is_folder = format == "diffusers"
    place = output.resolve()  # a link stays one
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=place.parent) as folder:
        made = Path(folder) / "made"
        exact, beside = Path(folder) / "exact.safetensors", Path(folder) / "scheduler"
        if scheduler is not None:
            _copy_scheduler(scheduler, beside, base_prediction)
        write_safetensors(exact, _tensors(changes), before or {})
        about = adapter_metadata.of(exact, None, name=output.stem, kind="lora")
        about |= {key: value for key, value in (before or {}).items() if key in _OF_BASE}
        writer = kohya.write_diffusers if is_folder else kohya.write
        if is_folder:
            made.mkdir()
        target = made / FILE if is_folder else made
        try:
            warnings = writer(exact, target, metadata=about, dtype=dtype)
        except UserError as error:  # names what the user cannot look at
            text = str(error).replace(str(exact), str(output)).replace(str(target), str(output))
            raise UserError(text) from None
        if is_folder and beside.is_dir():
            shutil.copytree(beside, made / "scheduler")
        check_replaceable(place)
        aside = [(place, Path(folder) / "before")] if place.is_dir() else []
        move_together([*aside, (made, place)])
    return output / FILE if is_folder else output, warnings


def _copy_scheduler(scheduler: Path, folder: Path, base_prediction: str | None) -> None:
    file = folder / "scheduler_config.json"
    folder.mkdir()
    shutil.copyfile(scheduler / file.name, file)
    if base_prediction is not None:
        settings = read_json(file, "") | {BASE_PREDICTION: base_prediction}
        write_atomically(file, (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())


def _tensors(changes: Changes) -> dict[str, Tensor]:
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
