"""Scores of a subject: how alike it is, how varied, what its class and everything else lost by it.

The baselines stand beside every number: the base prompted with the subject's name and with its
class, real pictures against each other (the ceiling), and a copy of the training set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from eval.estimate import Estimate
from eval.forgetting import Forgetting, forgetting
from eval.prompt_scores import BY_PROMPT, mean_of, of_pictures
from eval.scores import Score, Value
from eval.subject import diversity, likeness, real_likeness

Arms = Mapping[str, np.ndarray]  # (N, d) each, row by row of the same prompt and seed


def alike(
    arms: Arms,
    groups: Sequence[int],
    *,
    held_out: np.ndarray,
    training: np.ndarray,
    title: str,
    against: str,
) -> tuple[Score, dict[str, np.ndarray]]:
    """CLIP-I or DINO, by the features; and the likeness (N,) of each picture, by arm.

    The subject's real pictures are the held-out ones (K, d), or else those trained on (M, d): a
    copy of the training set is then what it is compared with, and scores best.
    """
    real = held_out if len(held_out) else training
    cosines = {arm: likeness(found, real) for arm, found in arms.items()}
    baselines: dict[str, Value] = {}
    if len(real) > 1:
        baselines["real"] = _value(ceiling(real), len(real))
    if len(training):
        baselines["training"] = _value(_copied(training, real, held_out), len(training))
    which = "held-out" if len(held_out) else "training"
    score = of_pictures(
        cosines,
        groups,
        against=against,
        title=title,
        better="more",
        how=f"Mean cosine of each picture with all {len(real)} {which} pictures of the subject "
        "(Ruiz et al. 2022, section 4.2).",
        warning=""
        if len(held_out)
        else "Compared with the pictures trained on, so that copying them scores best: hold some "
        "out, evaluation.path=DIR.",
        facts={"real_pictures": len(real)},
    )
    said = f"{BY_PROMPT}; of the real and the training pictures, 95 % jackknife over pictures"
    values = {**score.values, **baselines}
    return replace(score, values=values, interval=said if baselines else BY_PROMPT), cosines


def ceiling(real: np.ndarray) -> Estimate:
    """The mean cosine of all pairs of real pictures (K, d), with the jackknife's error: every
    picture is in K - 1 pairs, so the pairs are not independent. NaN below 3 pictures."""
    alike = real_likeness(real)
    return _of_pairs(alike, 2.0)


def _of_pairs(alike: np.ndarray, weight: float) -> Estimate:
    """The mean of what pictures (K,) have with the others; `weight`: how much a picture is in it,
    2 where both of a pair are of them. The jackknife that leaves one out."""
    count, mean = len(alike), float(alike.mean())
    if count <= weight:
        return Estimate(mean, float("nan"))
    spread = float(((alike - mean) ** 2).sum())
    error = weight / (count - weight) * np.sqrt((count - 1) / count * spread)
    return Estimate(mean, float(error), count - 1)


def _copied(training: np.ndarray, real: np.ndarray, held_out: np.ndarray) -> Estimate:
    """What a copy of the training pictures (M, d) scores, as a draw of pictures of both kinds."""
    value = float(likeness(training, real).mean())
    if not len(held_out):  # against themselves, once each: no part of the error
        count = len(real)
        own = _of_pairs(real_likeness(real), 2.0) if count > 1 else Estimate(value, float("nan"))
        return Estimate(value, (count - 1) / count * own.standard_error, count - 1)
    sides = [_of_pairs(likeness(*pair), 1.0) for pair in ((training, real), (real, training))]
    error = math.hypot(*(side.standard_error for side in sides))
    return Estimate(value, error, min(len(training), len(real)) - 1)


def _value(found: Estimate, count: int) -> Value:
    if not found.known:
        return Value(found.value, n=count)
    return Value(found.value, found.low, found.high, count)


def varied(arms: Arms, groups: Sequence[int], *, against: str) -> Score | None:
    """Diversity of the pictures of one prompt; None where each prompt has one."""
    spreads = {arm: diversity(found, groups) for arm, found in arms.items()}
    several = ~np.isnan(next(iter(spreads.values())))
    if not several.any():
        return None
    pictures = sum(count for count in Counter(groups).values() if count > 1)
    score = of_pictures(
        {arm: found[several] for arm, found in spreads.items()},
        range(int(several.sum())),
        against=against,
        title="Diversity",
        better=None,
        how="Mean 1 - cosine of the pictures of one prompt (as DIV of Ruiz et al. 2022, section "
        "4.3, which takes LPIPS). A subject is less varied than its class; near 0 every seed gives "
        "the same picture.",
        facts={"pictures": pictures},
    )
    return replace(
        score, values={arm: replace(value, n=pictures) for arm, value in score.values.items()}
    )


def class_kept(alike: Arms) -> Score:
    """Prior preservation, from how alike each picture of the class (N,) is to the subject."""
    pictures = range(len(next(iter(alike.values()))))  # of a few prompts: each is one draw of it
    return of_pictures(
        alike,
        pictures,
        interval="95 % bootstrap over pictures",
        title="Class turned into the subject",
        better="less",
        how="PRES: mean cosine of pictures of the class, prompted without the subject's name, with "
        "the subject's real pictures (Ruiz et al. 2022, section 4).",
    )


def forgotten(
    base: np.ndarray, finetuned: np.ndarray, other: np.ndarray
) -> tuple[Score, list[float]]:
    """Of general prompts: how far the pictures moved; and by how much each did."""
    found = forgetting(base, finetuned, other_seeds=other)
    score = Score(
        title="Forgetting",
        better="less",
        values={"finetuned": _moved(found)},
        how=f"{_MOVED}, {_SHARE if _has_yardstick(found) else _RAW}.",
        interval=BY_PROMPT,
        warning="" if _has_yardstick(found) else _NO_YARDSTICK,
        facts={"yardstick": found.yardstick, "prompts": len(base)},
    )
    return score, found.distances.tolist()


def _has_yardstick(found: Forgetting) -> bool:
    return bool(np.isfinite(found.by_prompt).all())


def _moved(found: Forgetting) -> Value:
    """The mean share, which is never negative; or the mean distance, without an interval, where
    there is no yardstick to judge it by."""
    if not _has_yardstick(found):
        return Value(float(found.distances.mean()), n=len(found.distances))
    value = mean_of(found.by_prompt, None)
    return value if value.low is None else replace(value, low=min(max(value.low, 0.0), value.value))


_MOVED = (
    "1 - cosine of the pictures that base and fine-tuned model make of the same general prompts "
    "and seeds"
)
_SHARE = (
    "as a share of that between two seeds of the base: 0 is the same picture, 1 as different as "
    "another seed makes it"
)
_RAW = "as it is: 0 is the same picture"
_NO_YARDSTICK = (
    "The base makes nearly the same picture by every seed, so there is nothing to measure by: this "
    "is the distance itself, and 1 is not another seed. Look at the pictures."
)
