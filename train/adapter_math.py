"""The arithmetic of low-rank changes: norms, products, sums and truncation, all in fp64.

What an adapter adds to a weight is scale x up x down, of some rank r. Nothing here multiplies that
out: with the factors' QR decompositions, up = Q R and down' = P S, it is Q (R S') P', so that its
singular values are those of an r x r matrix. Convolutions count as matrices (outputs, inputs x k x
k), as their up factor is 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NOISE = 1e-12  # of the largest singular value: below it there is only rounding


@dataclass(frozen=True)
class Factors:
    """What an adapter is on one layer."""

    down: Tensor
    """(r, inputs) or, of a convolution, (r, inputs, k, k)."""
    up: Tensor
    """(outputs, r) or (outputs, r, 1, 1)."""
    scale: float = 1.0
    magnitude: Tensor | None = None
    """DoRA's, one for each output. What such a layer adds depends on its base: see `on_base`."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def finite(self) -> bool:
        tensors = (self.down, self.up, *([self.magnitude] if self.magnitude is not None else []))
        return math.isfinite(self.scale) and all(bool(t.isfinite().all()) for t in tensors)


def matrices(factors: Factors) -> tuple[Tensor, Tensor]:
    """(outputs, r) with the scale in it, and (r, inputs x k x k); fp64."""
    return factors.up.double().flatten(1) * factors.scale, factors.down.double().flatten(1)


def delta(factors: Factors) -> Tensor:
    """The change multiplied out, in the weight's shape, fp64; without DoRA's magnitudes."""
    up, down = matrices(factors)
    return (up @ down).reshape(factors.shape)


def on_base(factors: Factors, weight: Tensor) -> Factors:
    """What a DoRA layer adds to its base's weight, as factors without magnitudes (Liu et al. 2024,
    eq. 5: m (W + d) / |W + d| - W). Other layers as they are."""
    if factors.magnitude is None:
        return factors
    moved = (weight.double() + delta(factors)).flatten(1)
    gain = factors.magnitude.double().flatten() / moved.norm(dim=1)
    return whole(gain[:, None] * moved - weight.double().flatten(1), factors.shape)


def whole(change: Tensor, shape: Sequence[int]) -> Factors:
    """Any change (outputs, inputs x k x k) of a weight of that shape, as factors of full rank."""
    import torch

    outputs, inputs = change.shape
    if outputs <= inputs:
        up, down = torch.eye(outputs, dtype=change.dtype), change
    else:
        up, down = change, torch.eye(inputs, dtype=change.dtype)
    return _shaped(up, down, shape)


def _shaped(up: Tensor, down: Tensor, shape: Sequence[int]) -> Factors:
    ones = (1,) * (len(shape) - 2)
    return Factors(down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *ones))


def _core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Q, core and P' of a change Q core P' with orthonormal Q and P."""
    import torch

    up, down = matrices(factors)
    q, r = torch.linalg.qr(up)
    p, s = torch.linalg.qr(down.T)
    return q, r @ s.T, p.T


def spectrum(factors: Factors) -> Tensor:
    """Singular values of the change, the largest first; as many as its rank at the most."""
    import torch

    return torch.linalg.svdvals(_core(factors)[1])


def norm(factors: Factors) -> float:
    """Frobenius norm of the change."""
    return float(_core(factors)[1].norm())


def inner(one: Factors, other: Factors) -> float:
    """Inner product of two changes of the same layer: the sum over their entries' products."""
    (up, down), (other_up, other_down) = matrices(one), matrices(other)
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def joined(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The weighted sum of changes of one layer, exactly: their factors side by side."""
    import torch

    pairs = [(matrices(factors), weight) for factors, weight in parts]
    up = torch.cat([weight * up for (up, _), weight in pairs], dim=1)
    down = torch.cat([down for (_, down), _ in pairs])
    return _shaped(up, down, parts[0][0].shape)


def distance(one: Factors, other: Factors) -> float:
    """Frobenius norm of the difference of two changes of the same layer."""
    return norm(joined([(one, 1.0), (other, -1.0)]))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007): r where r are
    alike, near 1 where one is far above the rest; 0 of no change."""
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def rank_for(values: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values to keep: `rank` of them at the most, and no more than hold the share
    `energy` of the sum of squares, or than are above rounding; one at the least."""
    kept = int((values > _NOISE * values[0]).sum())
    if energy is not None:
        shares = values.square().cumsum(0) / values.square().sum().clamp_min(1e-300)
        kept = min(kept, int((shares < energy).sum()) + 1)
    return max(1, min(kept, rank or kept))


def reduced(factors: Factors, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The nearest change of lower rank (Eckart and Young 1936), scale 1. See `rank_for`."""
    import torch

    q, core, p = _core(factors)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    kept = rank_for(s, rank, energy)
    root = s[:kept].sqrt()
    return _shaped(q @ u[:, :kept] * root, root[:, None] * (v[:kept] @ p), factors.shape)


def decomposed(change: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The nearest change of some rank to one that is given as a whole, scale 1. See `rank_for`.

    change: in the weight's shape. By the eigenvectors of the smaller Gram matrix, which of a
    convolution takes a tenth of an SVD's time. What is kept is the change itself, projected: with
    all of them it is all of it, however well the small ones are told apart.
    """
    matrix = change.double().flatten(1)
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix
    basis, rows = _projected(wide, rank, energy)
    size = rows.norm(dim=1).clamp_min(1e-300).sqrt()
    left, right = basis * size, rows / size[:, None]
    return _shaped(*((right.T, left.T) if turned else (left, right)), change.shape)


def _projected(wide: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """Directions (n, r) of the columns of a matrix (n, m), and what the matrix is in each."""
    import torch

    values, vectors = torch.linalg.eigh(wide @ wide.T)
    values = values.flip(0).clamp_min(0).sqrt()
    basis = vectors.flip(1)[:, : _rank_for_roots(values, rank, energy)]
    return basis, basis.T @ wide


def _rank_for_roots(values: Tensor, rank: int | None, energy: float | None) -> int:
    """`rank_for` of singular values that were found as roots: half of their digits are rounding, so
    none is left out for being small."""
    if energy is None:
        return min(rank or len(values), len(values))
    return rank_for(values, rank, energy)
