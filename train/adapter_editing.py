"""LoRAs made of others or of a fine-tuned model: merged, resized, extracted; and how far what was
written is from what was meant, layer by layer, so that no two models are in memory at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data.files import Progress, silent
from train import adapter_math
from train.adapter_factors import Changes
from train.adapter_math import Factors
from train.base_weights import Weights
from train.config import UserError
from train.safetensors_file import shown

if TYPE_CHECKING:
    from torch import Tensor

    from train.stored_tensors import Stored


@dataclass(frozen=True)
class Size:
    """How large a change may be: both None keep all of it."""

    rank: int | None = None
    energy: float | None = None
    """Share of the sum of the squared singular values that is kept at the least, of each layer."""
    kernel_rank: int | None = None
    """The rank of convolutions with kernels larger than 1x1, if another; 0 leaves them out."""

    @property
    def whole(self) -> bool:
        return self.rank is None and self.energy is None

    def of(self, shape: Sequence[int]) -> int | None:
        """The rank of a layer of that shape."""
        has_kernel = max(shape[2:], default=1) > 1
        return self.kernel_rank if has_kernel and self.kernel_rank is not None else self.rank


@dataclass(frozen=True)
class Row:
    """What became of the change of one layer."""

    layer: str
    rank_before: int
    rank: int
    norm: float
    """Of the change that was meant."""
    error: float
    """Norm of the difference between that and what the file says."""


def merged(
    sources: Sequence[tuple[Changes, float]], size: Size, progress: Progress = silent
) -> Changes:
    """The weighted sum of adapters: as it is, with the ranks added up, or cut to a size. Raises
    UserError where a size leaves no layer."""
    found: dict[str, Factors] = {}
    names = list(dict.fromkeys(name for changes, _ in sources for name in changes))
    for done, name in enumerate(names, 1):
        whole = _sum_of(sources, name)
        if not size.whole:
            rank = size.of(whole.shape)
            if rank == 0:
                continue
            whole = adapter_math.reduced(whole, rank=rank, energy=size.energy)
        found[name] = replace(whole, down=whole.down.float(), up=whole.up.float())
        progress(done, len(names))
    if not found:
        raise UserError(
            "conv_rank=0 leaves out all layers: every one is a convolution larger than 1x1. Give "
            "conv_rank=1 or more, or leave it out"
        )
    return found


def _sum_of(sources: Sequence[tuple[Changes, float]], name: str) -> Factors:
    return adapter_math.joined([(c[name], weight) for c, weight in sources if name in c])


def errors(sources: Sequence[tuple[Changes, float]], written: Changes) -> list[Row]:
    """How far a file is from the weighted sum of adapters."""
    rows = []
    for name in dict.fromkeys(name for changes, _ in sources for name in changes):
        meant = _sum_of(sources, name)
        is_there = name in written
        error = adapter_math.distance(meant, written[name]) if is_there else None
        norm, rank = adapter_math.norm(meant), written[name].rank if is_there else 0
        rows.append(Row(name, meant.rank, rank, norm, norm if error is None else error))
    return rows


def extracted(
    tuned: Weights,
    base: Weights,
    size: Size,
    *,
    parts: Iterable[str],
    progress: Progress = silent,
) -> Changes:
    """What fine-tuning did to linear layers and convolutions, as factors; layers that it left alone
    are left out. Raises UserError for models of different shapes, and where nothing changed."""
    found: dict[str, Factors] = {}
    names = common_layers(tuned, base, parts)
    for done, name in enumerate(names, 1):
        change = difference(tuned.layers[name], base.layers[name])
        rank = size.of(change.shape)
        if rank != 0 and bool(change.any()):
            _check_finite(name, change)
            factors = adapter_math.decomposed(change, rank=rank, energy=size.energy)
            found[name] = replace(factors, down=factors.down.float(), up=factors.up.float())
        progress(done, len(names))
    if not found:
        raise UserError(
            "tuned= and base= do not differ in any layer that was asked for: there is nothing to "
            "extract"
        )
    return found


def common_layers(tuned: Weights, base: Weights, parts: Iterable[str]) -> list[str]:
    """The layers of both models. Raises UserError where their shapes are not the same."""
    starts = tuple(f"{part}." for part in parts)
    names = [name for name in base.layers if name.startswith(starts)]
    for name in names:
        there, here = base.layers[name].shape, tuned.layers.get(name)
        if here is None or here.shape != there:
            raise UserError(
                f"tuned= is not a fine-tune of base=: {shown(name)} is {there} in the base and "
                f"{here.shape if here else 'absent'} in the other"
            )
    return names


def _check_finite(name: str, change: Tensor) -> None:
    if not change.isfinite().all():
        raise UserError(f"{shown(name)} is not finite in tuned= or base=: training had diverged")


def difference(tuned: Stored, base: Stored) -> Tensor:
    """fp64, in the weight's shape."""
    return tuned.read().double() - base.read().double()


def extraction_errors(
    tuned: Weights,
    base: Weights,
    written: Changes,
    *,
    parts: Iterable[str],
    progress: Progress = silent,
) -> list[Row]:
    """How far a file is from what fine-tuning did, of every layer that it changed."""
    rows = []
    names = common_layers(tuned, base, parts)
    for done, name in enumerate(names, 1):
        change = difference(tuned.layers[name], base.layers[name])
        norm, rank, error = float(change.norm()), 0, float(change.norm())
        if name in written:
            made = adapter_math.delta(written[name])
            rank, error = written[name].rank, float((change - made.reshape(change.shape)).norm())
        if norm:
            full = min(change.shape[0], change[0].numel())
            rows.append(Row(name, full, rank, norm, error))
        progress(done, len(names))
    return rows


def left_out(tuned: Weights, base: Weights, parts: Iterable[str]) -> tuple[int, float]:
    """How many biases, norms and embeddings fine-tuning changed, which no LoRA holds, and by what
    norm all together. New rows of embeddings do not count."""
    starts = tuple(f"{part}." for part in parts)
    norms = []
    for name, stored in base.rest.items():
        if name.startswith(starts) and name in tuned.rest:
            before, after = stored.read().double(), tuned.rest[name].read().double()
            norms.append(float((after[: len(before)] - before[: len(after)]).norm()))
    return sum(norm > 0 for norm in norms), math.hypot(*norms)


def total(rows: Sequence[Row], of: Callable[[Row], float]) -> float:
    """Root of the sum of squares over layers."""
    return math.hypot(*map(of, rows))


def relative_error(rows: Sequence[Row]) -> float:
    """Norm of all differences over that of all changes."""
    norm = total(rows, lambda row: row.norm)
    return total(rows, lambda row: row.error) / norm if norm else 0.0


def ranks(changes: Mapping[str, Factors]) -> tuple[int, int]:
    """The least and the most."""
    found = [factors.rank for factors in changes.values()]
    return min(found), max(found)
