"""Scores of whole sets of pictures against held-out ones: FID, KID, CMMD and their kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from eval.coverage import coverage
from eval.estimate import Estimate
from eval.figures import number
from eval.frechet import expected_bias, fid_infinity, small_sample_warning
from eval.frechet_jackknife import jackknife
from eval.kernel_distances import cmmd, cmmd_change, cmmd_estimate, kid, kid_change
from eval.moments import Moments
from eval.scores import Change, Score, Value
from eval.significance import FEWEST
from eval.variety import inception_score, vendi_score
from train.config import UserError

Arms = Mapping[str, np.ndarray]  # (N, d) each, row by row of the same prompt and seed
JACKKNIFE = "95 %, Student's t, jackknife over prompts"


@dataclass(frozen=True)
class Features:
    """What one extractor sees in the pictures."""

    reference: np.ndarray
    """(M, d), of held-out pictures."""
    arms: Arms
    extractor: Mapping[str, Any]
    """Its `describe()`."""

    @property
    def smallest(self) -> int:
        """Of the counts of pictures, the least."""
        return min(len(self.reference), *map(len, self.arms.values()))

    @property
    def has_change(self) -> bool:
        return {"base", "finetuned"} <= self.arms.keys()

    @property
    def where(self) -> str:
        """The second half of how a distance was computed."""
        n = len(next(iter(self.arms.values())))
        return (
            f"of {self.reference.shape[1]}-dimensional features by {self.extractor['name']}, {n} "
            f"generated against {len(self.reference)} held-out pictures. Only to be compared where "
            "all of these are the same."
        )


@dataclass(frozen=True)
class Labels:
    """Which pictures depend on each other: those of one label, a prompt that is a caption too."""

    prompts: np.ndarray
    """(N,)"""
    captions: np.ndarray
    """(M,), of the held-out pictures."""

    @cached_property
    def count(self) -> int:
        """Different ones, of the side that has fewer."""
        return min(len(np.unique(self.prompts)), len(np.unique(self.captions)))


def scores(
    reference: np.ndarray,
    arms: Arms,
    *,
    groups: Sequence[int],
    of_reference: Sequence[int],
    extractor: Mapping[str, Any],
    clip: Features | None = None,
    classes: Arms | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """All of them, the most telling first: FID where there are as many pictures as dimensions, else
    the kernel distances, which are unbiased at any number.

    reference (M, d): features of held-out pictures. groups (N), of_reference (M): labels of the
    prompts and of the held-out captions; rows of equal labels depend on each other. clip: what a
    CLIP sees in the same pictures, which CMMD is defined on; without, there is no CMMD. classes:
    class probabilities (N, K) of each arm, where the features are Inception's.
    """
    seen, labels = (
        Features(reference, arms, extractor),
        Labels(*map(np.asarray, (groups, of_reference))),
    )
    frechet = {"fid": fid(seen, labels), **_infinite(seen, labels, seed)}
    kernels = {"kid": kernel("kid", seen, labels), **(_cmmd(clip, labels) if clip else {})}
    first, second = (
        (frechet, kernels) if seen.smallest >= reference.shape[1] else (kernels, frechet)
    )
    return {**first, **second, **_manifold(seen), **_variety(arms, classes)}


def fid(seen: Features, labels: Labels) -> Score:
    """The FID of each arm, and its change."""
    found = jackknife(
        seen.reference,
        *seen.arms.values(),
        groups=labels.prompts.tolist(),
        reference_groups=labels.captions.tolist(),
    )
    one = np.eye(len(seen.arms))
    by_arm = {arm: found.estimate(*one[k]) for k, arm in enumerate(seen.arms)}
    n, m, d = len(labels.prompts), *seen.reference.shape
    bias = _bias(seen, n, m)
    return _judged(
        Score(
            title="FID",
            better="less",
            values={arm: _value(each, n, floor=0.0) for arm, each in by_arm.items()},
            how="Fréchet distance in float64 (Heusel et al. 2017), "
            + seen.where
            + _alike(bias, n, m, d),
            interval=JACKKNIFE,
            warning=_doubt([each.value for each in by_arm.values()], bias, n, m, d),
            facts={"bias_estimate": bias, "pictures": n, "references": m, "dimension": d},
        ),
        labels,
        lambda: found.estimate(*(_SIGNS.get(arm, 0.0) for arm in seen.arms)),
        seen,
    )


def _bias(seen: Features, n: int, m: int) -> float | None:
    """What two sets of these sizes from one distribution score, where there are pictures enough to
    say: of fewer than dimensions the formula gives a fraction of it."""
    if seen.smallest < seen.reference.shape[1]:
        return None
    return expected_bias(np.linalg.eigvalsh(Moments.of(seen.reference).cov), n, m)


def _about(bias: float, n: int, m: int, d: int) -> str:
    return f"{'at least ' if min(n, m) < 2 * d else ''}about {number(bias)}"


def _alike(bias: float | None, n: int, m: int, d: int) -> str:
    if bias is None:
        return ""
    return f" Two sets of these sizes from one distribution would score {_about(bias, n, m, d)}."


def _doubt(values: Sequence[float], bias: float | None, n: int, m: int, d: int) -> str:
    if bias is None:
        return small_sample_warning(d, n, m) or ""
    if bias <= 0.1 * min(values):
        return ""
    return (
        f"Two sets as small as these ({n} and {m} pictures), drawn independently from one and the "
        f"same distribution, would already have an FID of {_about(bias, n, m, d)}: read the "
        "change, not the value, and compare it only with runs of the same counts."
    )


def _judged(score: Score, labels: Labels, change: Callable[[], Estimate], seen: Features) -> Score:
    """With the change, or where there are too few prompts for one with a warning that says so."""
    if not seen.has_change:
        return score
    if labels.count < FEWEST:
        said = (
            f"Whether it changed cannot be told from {labels.count} different prompt"
            f"{'s' * (labels.count != 1)}: use at least {FEWEST}."
        )
        return replace(score, warning=" ".join(filter(None, [score.warning, said])))
    moved = change()
    if not moved.known:
        return score
    return replace(score, change=Change(moved.value, moved.low, moved.high))


def _infinite(seen: Features, labels: Labels, seed: int) -> dict[str, Score]:
    try:
        found = {
            arm: fid_infinity(rows, seen.reference, groups=labels.prompts.tolist(), seed=seed)
            for arm, rows in seen.arms.items()
        }
    except UserError:
        return {}  # too few pictures
    return {
        "fid_infinity": Score(
            title="FID∞",
            better="less",
            values={arm: _value(each, len(labels.prompts)) for arm, each in found.items()},
            how="FID of ever more pictures, extrapolated to infinitely many (Chong and Forsyth "
            f"2020), {seen.where}",
            interval="95 %, Student's t, of the prompts and of the extrapolation; the held-out "
            "pictures as they are",
        )
    }


def kernel(name: str, seen: Features, labels: Labels) -> Score:
    """KID or CMMD, whose unbiased estimators may be a little below 0."""
    title, of, change, how = _KERNELS[name]
    together = {"groups": labels.prompts, "groups_of_b": labels.captions}
    values = {
        arm: _value(of(rows, seen.reference, **together), len(rows))
        for arm, rows in seen.arms.items()
    }
    score = Score(title, "less", values, how=how + seen.where, interval=JACKKNIFE)
    return _judged(
        score,
        labels,
        lambda: change(
            seen.arms["base"],
            seen.arms["finetuned"],
            seen.reference,
            groups=labels.prompts,
            reference_groups=labels.captions,
        ),
        seen,
    )


def _cmmd(seen: Features, labels: Labels) -> dict[str, Score]:
    biased = {arm: Value(cmmd(rows, seen.reference).biased) for arm, rows in seen.arms.items()}
    return {
        "cmmd": kernel("cmmd", seen, labels),
        "cmmd_biased": Score(
            title="CMMD, biased",
            better="less",
            values=biased,
            how=_CMMD.format("the published, biased estimator") + seen.where,
        ),
    }


def _value(found: Estimate, count: int, *, floor: float | None = None) -> Value:
    """With the interval, where it is known; `floor`: what is never less."""
    if not found.known:
        return Value(found.value, n=count)
    low = found.low if floor is None else max(found.low, min(floor, found.value))
    return Value(found.value, low, found.high, count)


def _manifold(seen: Features) -> dict[str, Score]:
    if seen.smallest <= 10:
        return {}
    found = {arm: coverage(seen.reference, rows) for arm, rows in seen.arms.items()}
    about = {
        "precision": "Share of the generated pictures that lie among the held-out ones",
        "recall": "Share of the held-out pictures that lie among the generated ones",
        "density": "How many held-out pictures the generated ones lie among, by what is usual",
        "coverage": "Share of the held-out pictures that have a generated one near",
    }
    return {
        name: Score(
            title=name.capitalize(),
            better="more",
            values={arm: Value(float(getattr(each, name))) for arm, each in found.items()},
            how=f"{said} ({_SOURCES[name]}, 3 neighbours), {seen.where}",
            warning="" if seen.smallest >= 100 else f"Of {seen.smallest} pictures only: rough.",
        )
        for name, said in about.items()
    }


def _variety(arms: Arms, classes: Arms | None) -> dict[str, Score]:
    found = {
        "vendi": Score(
            title="Vendi score",
            better=None,
            values={arm: Value(vendi_score(rows)) for arm, rows in arms.items()},
            how="How many pictures wholly unlike each other would be as varied (Friedman and Dieng "
            "2023, cosine kernel).",
        )
    }
    if classes:
        found["inception_score"] = Score(
            title="Inception score",
            better=None,
            values={arm: Value(inception_score(rows)) for arm, rows in classes.items()},
            how="exp of the mean divergence of each picture's classes from all pictures' (Salimans "
            "et al. 2016); says nothing of what is not in ImageNet.",
        )
    return found


_KID = "Unbiased squared MMD with the polynomial kernel (Bińkowski et al. 2018), "
_CMMD = (
    "Squared MMD with a Gaussian kernel of width 10 on unit-normalised embeddings, times 1000 "
    "(Jayasumana et al. 2024), {}, "
)
_KERNELS: Mapping[str, tuple[str, Callable[..., Estimate], Callable[..., Estimate], str]] = {
    "kid": ("KID", kid, kid_change, _KID),
    "cmmd": ("CMMD", cmmd_estimate, cmmd_change, _CMMD.format("unbiased")),
}
_SIGNS = {"base": -1.0, "finetuned": 1.0}  # of the change
_SOURCES = {
    "precision": "Kynkäänniemi et al. 2019",
    "recall": "Kynkäänniemi et al. 2019",
    "density": "Naeem et al. 2020",
    "coverage": "Naeem et al. 2020",
}
