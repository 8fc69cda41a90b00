"""Scores of whole sets of pictures against held-out ones: FID, KID, CMMD and their kin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.coverage import coverage
from eval.estimate import NORMAL_95, Estimate
from eval.figures import number
from eval.frechet import (
    bootstrap,
    expected_bias,
    fid_infinity,
    frechet_distance,
    small_sample_warning,
)
from eval.kernel_distances import cmmd, cmmd_change, cmmd_estimate, kid, kid_change
from eval.moments import Moments
from eval.scores import Change, Score, Value
from eval.variety import inception_score, vendi_score
from train.config import UserError

RESAMPLES = 100  # of the FID: enough for a standard deviation

Arms = Mapping[str, np.ndarray]  # (N, d) each, row by row of the same prompt and seed


def scores(
    reference: np.ndarray,
    arms: Arms,
    *,
    groups: Sequence[int],
    of_reference: Sequence[int],
    extractor: Mapping[str, Any],
    classes: Arms | None = None,
    seed: int = 0,
) -> dict[str, Score]:
    """All of them, the most telling first: FID where there are as many pictures as dimensions, else
    the kernel distances, which are unbiased at any number.

    reference (M, d): features of held-out pictures. groups (N), of_reference (M): labels of the
    prompts and of the held-out captions; equal labels are drawn together. classes: class
    probabilities (N, K) of each arm, where the features are Inception's.
    """
    where = _where(reference, arms, extractor)
    labels = np.asarray(groups), np.asarray(of_reference)
    frechet = {"fid": fid(reference, arms, labels, where, seed=seed)}
    if len(infinite := _infinite(reference, arms, where, seed)):
        frechet["fid_infinity"] = infinite["fid_infinity"]
    kernels = _kernels(reference, arms, labels, where)
    enough = min(len(reference), *map(len, arms.values())) >= reference.shape[1]
    first, second = (frechet, kernels) if enough else (kernels, frechet)
    return {**first, **second, **_manifold(reference, arms, where), **_variety(arms, classes)}


def fid(
    reference: np.ndarray,
    arms: Arms,
    labels: tuple[np.ndarray, np.ndarray],
    where: str,
    *,
    seed: int = 0,
) -> Score:
    real = Moments.of(reference)
    values = {arm: frechet_distance(Moments.of(found), real) for arm, found in arms.items()}
    resampled = bootstrap(
        reference,
        *arms.values(),
        groups=labels[0].tolist(),
        reference_groups=labels[1].tolist(),
        resamples=RESAMPLES,
        seed=seed,
    )
    columns = dict(zip(arms, resampled.T, strict=True))
    n, m, d = len(next(iter(arms.values()))), *reference.shape
    bias = expected_bias(np.linalg.eigvalsh(real.cov), n, m)
    return Score(
        title="FID",
        better="less",
        values={
            arm: _around(value, columns[arm], count=n, floor=0.0) for arm, value in values.items()
        },
        change=_difference(values, columns),
        how=f"Fréchet distance in float64 (Heusel et al. 2017), {where} Two sets of these sizes "
        f"from one distribution would score about {number(bias)}.",
        interval="1.96 standard deviations, bootstrap over prompts",
        warning=_doubt(values, d, n, m, bias),
        facts={"bias_estimate": bias, "pictures": n, "references": m, "dimension": d},
    )


def _doubt(values: Mapping[str, float], d: int, n: int, m: int, bias: float) -> str:
    found = [small_sample_warning(d, n, m) or ""]
    if bias > 0.1 * min(values.values()):
        found.append(
            f"Two sets as small as these ({n} and {m} pictures), drawn independently from one and "
            f"the same distribution, would already have an FID of about {number(bias)}: read the "
            "change, not the value, and compare it only with runs of the same counts."
        )
    return " ".join(filter(None, found))


def _infinite(reference: np.ndarray, arms: Arms, where: str, seed: int) -> dict[str, Score]:
    try:
        found = {arm: fid_infinity(rows, reference, seed=seed) for arm, rows in arms.items()}
    except UserError:
        return {}  # too few pictures
    return {
        "fid_infinity": Score(
            title="FID∞",
            better="less",
            values={arm: Value(e.value, e.low, e.high) for arm, e in found.items()},
            how="FID of ever more pictures, extrapolated to infinitely many (Chong and Forsyth "
            f"2020), {where}",
            interval="1.96 standard errors, of the pictures and of the extrapolation",
        )
    }


def _kernels(
    reference: np.ndarray, arms: Arms, labels: tuple[np.ndarray, np.ndarray], where: str
) -> dict[str, Score]:
    """KID and CMMD, whose unbiased estimators may be a little below 0."""
    found: dict[str, Score] = {}
    against = {"groups_of_b": labels[1]}
    for name, title, of, how in (
        ("kid", "KID", lambda rows: kid(rows, reference, groups=labels[0], **against), _KID),
        (
            "cmmd",
            "CMMD",
            lambda rows: cmmd_estimate(rows, reference, groups=labels[0], **against),
            _CMMD.format("unbiased"),
        ),
    ):
        found[name] = Score(
            title=title,
            better="less",
            values={arm: _value(of(rows), len(rows)) for arm, rows in arms.items()},
            change=_changed(_CHANGES[name], reference, arms, labels),
            how=how + where,
            interval="1.96 standard errors, jackknife over prompts",
        )
    biased = {arm: Value(cmmd(rows, reference).biased) for arm, rows in arms.items()}
    found["cmmd_biased"] = Score(
        title="CMMD, biased",
        better="less",
        values=biased,
        how=_CMMD.format("the published, biased estimator") + where,
    )
    return found


def _changed(
    change: Callable[..., Estimate],
    reference: np.ndarray,
    arms: Arms,
    labels: tuple[np.ndarray, np.ndarray],
) -> Change | None:
    if not {"base", "finetuned"} <= arms.keys():
        return None
    rows = arms["base"], arms["finetuned"]
    moved = change(*rows, reference, groups=labels[0], reference_groups=labels[1])
    known = math.isfinite(moved.standard_error)  # not of a single prompt
    return Change(moved.value, moved.low, moved.high) if known else None


def _value(found: Estimate, count: int) -> Value:
    known = math.isfinite(found.standard_error)
    return Value(found.value, found.low if known else None, found.high if known else None, count)


def _manifold(reference: np.ndarray, arms: Arms, where: str) -> dict[str, Score]:
    smallest = min(len(reference), *map(len, arms.values()))
    if smallest <= 10:
        return {}
    found = {arm: coverage(reference, rows) for arm, rows in arms.items()}
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
            how=f"{said} ({_SOURCES[name]}, 3 neighbours), {where}",
            warning="" if smallest >= 100 else f"Of {smallest} pictures only: rough.",
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


def _where(reference: np.ndarray, arms: Arms, extractor: Mapping[str, Any]) -> str:
    n = len(next(iter(arms.values())))
    return (
        f"of {reference.shape[1]}-dimensional features by {extractor['name']}, {n} generated "
        f"against {len(reference)} held-out pictures. Only to be compared where all of these are "
        "the same."
    )


def _around(value: float, resampled: np.ndarray, *, count: int, floor: float) -> Value:
    half = NORMAL_95 * float(resampled.std(ddof=1))
    return Value(value, max(value - half, min(floor, value)), value + half, count)


def _difference(values: Mapping[str, float], columns: Mapping[str, np.ndarray]) -> Change | None:
    if not {"base", "finetuned"} <= values.keys():
        return None
    moved = values["finetuned"] - values["base"]
    half = NORMAL_95 * float((columns["finetuned"] - columns["base"]).std(ddof=1))
    return Change(moved, moved - half, moved + half)


_CHANGES: Mapping[str, Callable[..., Estimate]] = {"kid": kid_change, "cmmd": cmmd_change}
_KID = "Unbiased squared MMD with the polynomial kernel (Bińkowski et al. 2018), "
_CMMD = (
    "Squared MMD with a Gaussian kernel of width 10 on unit-normalised embeddings, times 1000 "
    "(Jayasumana et al. 2024), {}, "
)
_SOURCES = {
    "precision": "Kynkäänniemi et al. 2019",
    "recall": "Kynkäänniemi et al. 2019",
    "density": "Naeem et al. 2020",
    "coverage": "Naeem et al. 2020",
}
