"""Statistics of reference pictures in a file, so that they are taken once.

The file says of what they are: the extractor (its weights' hash, its resize mode and dimension) and
the number of pictures. Statistics of another kind give other distances without any sign of it, so
they are refused. safetensors; `mean` (d,) and `m2` (d, d), see eval/moments.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval.moments import Moments
from train.config import UserError

FORMAT = "sd-atelier reference 1"
_ALIKE = {"sha256": "weights", "resize": "resize mode", "dimension": "dimension"}


def save(path: str | Path, moments: Moments, extractor: Mapping[str, Any], **sources: Any) -> None:
    """Write the moments with the extractor's `describe()`, and whatever says where they are from.

    The file is there whole or not at all.
    """
    from safetensors.numpy import save as serialise

    from data.files import write_atomically

    missing = [key for key in _ALIKE if key not in extractor]
    if missing or extractor["dimension"] != moments.dimension:
        raise ValueError(f"{dict(extractor)} does not describe {moments.dimension} dimensions")
    about = {"extractor": dict(extractor), "n": moments.n, "sources": sources}
    header = {"format": FORMAT, "about": json.dumps(about, sort_keys=True)}
    tensors = {"mean": moments.mean, "m2": moments.m2}
    write_atomically(Path(path), serialise(tensors, metadata=header))


def load(path: str | Path, extractor: Mapping[str, Any]) -> Moments:
    """The moments, if they are of an extractor like this one (`describe()`), else UserError."""
    moments, about = read(path)
    found = about["extractor"]
    for key, title in _ALIKE.items():
        if found[key] != extractor[key]:
            raise UserError(
                f"{path} is of another {title}: of {_named(found, key)}, and not of "
                f"{_named(extractor, key)}; remake it with this extractor, or evaluate with that"
            )
    return moments


def read(path: str | Path) -> tuple[Moments, dict[str, Any]]:
    """The moments and what the file says of them: `extractor`, `n` and `sources`."""
    from safetensors import SafetensorError, safe_open

    from train.safetensors_file import read_header

    try:
        read_header(Path(path))
        with safe_open(str(path), framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise KeyError("format")
            about = json.loads(header["about"])
            mean, m2 = file.get_tensor("mean"), file.get_tensor("m2")
            return _moments(about, mean, m2), about
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no reference file, or a damaged one ({error}): remake it"
        ) from None


def _moments(about: Any, mean: Any, m2: Any) -> Moments:
    dimension, n = _described(about)
    if mean.shape != (dimension,) or m2.shape != (dimension, dimension):
        raise ValueError(f"shapes {mean.shape} and {m2.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(m2).all()):
        raise ValueError("NaN or infinity in it")
    moments = Moments(0)
    moments.n, moments.mean, moments.m2 = n, mean.astype(np.float64), m2.astype(np.float64)
    return moments


def _described(about: Any) -> tuple[int, int]:
    """Dimension and number of pictures; ValueError where they or the extractor are not told."""
    extractor = about.get("extractor") if isinstance(about, dict) else None
    if not isinstance(extractor, dict) or not all(key in extractor for key in _ALIKE):
        raise ValueError("no extractor described")
    dimension, n = extractor["dimension"], about.get("n")
    if type(dimension) is not int or type(n) is not int or n < 2:
        raise ValueError(f"of {n} pictures in {dimension} dimensions")
    return dimension, n


def _named(extractor: Mapping[str, Any], key: str) -> str:
    value = str(extractor[key])
    return f"{extractor.get('name', 'an extractor')} ({value[:12] if key == 'sha256' else value})"
