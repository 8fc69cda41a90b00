"""What LoRA files are and how they differ, in figures."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train import adapter_factors, adapter_math, adapter_metadata, adapters, lora_file
from train.adapter_factors import Changes
from train.safetensors_file import read_header
from train.stored_tensors import Stored

Row = Mapping[str, Any]


def inspect(file: Path, weights: Mapping[str, Stored] | None = None) -> dict[str, Any]:
    """What a LoRA file is: layers, ranks, alphas, norms, hashes and metadata.

    weights: its base's, by layer, against which norms are then given too, and without which those
    of DoRA are of its factors' product alone. Raises UserError for what is no LoRA of that base.
    """
    changes = adapter_factors.read(file, finite=False)
    if weights is not None:
        adapter_factors.check_fit(file, changes, weights)
    layers = [_layer(name, changes[name], weights) for name in sorted(changes, key=in_order)]
    return {
        **_of_file(file),
        "dora": any(layer["dora"] for layer in layers),
        "targets": _counts(map(target_of, changes)),
        "ranks": _counts(factors.rank for factors in changes.values()),
        "alphas": _counts(round(factors.alpha, 6) for factors in changes.values()),
        "not_finite": [layer["layer"] for layer in layers if not layer["finite"]],
        **_sums(layers),
        "blocks": [
            {"block": block, **_sums(rows), **_means(rows)} for block, rows in _by_block(layers)
        ],
        "layers": layers,
        "hashes": hashes(file),
    }


def _of_file(file: Path) -> dict[str, Any]:
    header = read_header(file)
    about = adapter_metadata.About.of(file, None, file.stem, "lora")
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "format": "kohya" if lora_file.is_kohya(header.tensors) else "diffusers",
        "family": about.family,
        "version": header.metadata.get("ss_base_model_version"),
        "prediction_type": about.prediction,
        "dtypes": _counts(entry.dtype for entry in header.tensors.values()),
        "parameters": sum(math.prod(e.shape) for e in header.tensors.values() if e.shape),
        "metadata": dict(sorted(header.metadata.items())),
    }


def _layer(
    name: str, factors: adapter_math.Factors, weights: Mapping[str, Stored] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "layer": name,
        "shape": list(factors.shape),
        "rank": factors.rank,
        "alpha": round(factors.alpha, 6),
        "dora": factors.magnitude is not None,
        "finite": factors.finite,
        "norm": None,
        "effective_rank": None,
    }
    if factors.finite:
        weight = weights[name].read() if weights is not None else None
        change = factors if weight is None else adapter_math.on_base(factors, weight)
        values = adapter_math.spectrum(change)
        row["norm"] = float(values.norm())
        row["effective_rank"] = adapter_math.effective_rank(values)
        if weight is not None:
            row["of_base"] = float(weight.double().norm())
    return row


def _sums(layers: Sequence[Row]) -> dict[str, Any]:
    """Of the layers that are finite: how many, and their norm, of their own and of the base's."""
    sound = [layer for layer in layers if layer["finite"]]
    found: dict[str, Any] = {"count": len(layers), "norm": _root(layer["norm"] for layer in sound)}
    if sound and "of_base" in sound[0]:
        base = _root(layer["of_base"] for layer in sound)
        found["relative_norm"] = _ratio(found["norm"], base)
    return found


def _means(layers: Sequence[Row]) -> dict[str, Any]:
    ranks = sorted({layer["rank"] for layer in layers})
    effective = [layer["effective_rank"] for layer in layers if layer["finite"]]
    return {"ranks": ranks, "effective_rank": _ratio(sum(effective), len(effective))}


def compare(files: Sequence[Path], both: Sequence[Changes]) -> dict[str, Any]:
    """How two adapters' changes differ, all in all and by block; a layer that one of them leaves
    alone counts as 0 there.

    both: of the files, scaled, without DoRA, of the same base (`adapter_factors.check_alike`).
    """
    one, other = both
    names = dict.fromkeys((*one, *other))
    layers = [_pair(name, one.get(name), other.get(name)) for name in names]
    layers.sort(key=lambda row: in_order(row["layer"]))
    return {
        "files": [str(file) for file in files],
        "only_first": sorted(one.keys() - other.keys()),
        "only_second": sorted(other.keys() - one.keys()),
        **_alike(layers),
        "blocks": [{"block": block, **_alike(rows)} for block, rows in _by_block(layers)],
        "layers": layers,
    }


def _pair(
    name: str, one: adapter_math.Factors | None, other: adapter_math.Factors | None
) -> dict[str, Any]:
    norms = [adapter_math.norm(f) if f is not None else 0.0 for f in (one, other)]
    both = one is not None and other is not None
    inner = adapter_math.inner(one, other) if one is not None and other is not None else 0.0
    apart = adapter_math.distance(one, other) if one is not None and other is not None else 0.0
    return {
        "layer": name,
        "norms": norms,
        "inner": inner,
        "apart": apart if both else max(norms),
        "cosine": _ratio(inner, norms[0] * norms[1]),
        "distance": _ratio(apart if both else max(norms), norms[0]),
        "in": [one is not None, other is not None],
    }


def _alike(layers: Sequence[Row]) -> dict[str, Any]:
    first, second = (_root(layer["norms"][which] for layer in layers) for which in (0, 1))
    return {
        "count": len(layers),
        "common": sum(all(layer["in"]) for layer in layers),
        "norms": [first, second],
        "cosine": _ratio(sum(layer["inner"] for layer in layers), first * second),
        "distance": _ratio(_root(layer["apart"] for layer in layers), first),
    }


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole else None


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def hashes(file: Path) -> dict[str, Any]:
    """sha256 of the file, and of its tensors (`sshs_model_hash`) with what its metadata says."""
    header = read_header(file)
    start = min((entry.first for entry in header.tensors.values()), default=0)
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with file.open("rb") as stream:
        whole.update(stream.read(start))
        while chunk := stream.read(1 << 20):
            whole.update(chunk)
            tensors.update(chunk)
    said = header.metadata.get("sshs_model_hash")
    return {
        "sha256": whole.hexdigest(),
        "sshs_model_hash": tensors.hexdigest(),
        "as_said": None if said is None else said == tensors.hexdigest(),
    }


# Names


def target_of(layer: str) -> str:
    """Which of lora.targets a layer belongs to; "other" for none."""
    table = adapters.TARGETS if layer.startswith("unet.") else adapters.TEXT_TARGETS
    for target, ends in table.items():
        if layer.endswith(tuple(f".{end}" for end in ends)):
            return target if layer.startswith("unet.") else f"text_encoder {target}"
    return "other"


def block_of(layer: str) -> str:
    """The block that a layer lies in: `unet down_blocks.0`, `text_encoder layers.3`."""
    part, _, path = layer.partition(".")
    match = re.search(r"(?:down_blocks|up_blocks|layers)\.\d+|mid_block", path)
    return f"{part} {match[0] if match else 'other'}"


def _by_block(layers: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    blocks: dict[str, list[Row]] = {}
    for layer in layers:
        blocks.setdefault(block_of(layer["layer"]), []).append(layer)
    return list(blocks.items())


def in_order(layer: str) -> list[tuple[int, str]]:
    """A key to sort layers by: as the network has them, numbers by their value, the UNet first."""
    words = layer.split(".")
    parts = [(int(word), "") if word.isdigit() else (-1, word) for word in words]
    return [(0 if words[0] == "unet" else 1, ""), *parts]
