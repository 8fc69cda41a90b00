"""Scores of a subject: how alike it is, how varied, what its class and everything else lost by it.

The baselines stand beside every number: the base prompted with the subject's name and with its
class, real pictures against each other (the ceiling), and a copy of the training set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.forgetting import forgetting
from eval.prompt_scores import mean_of, of_pictures
from eval.scores import Score, Value
from eval.subject import diversity, likeness, prior_preservation, real_likeness

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
        baselines["real"] = mean_of(real_likeness(real), None)
    if len(training):
        baselines["training"] = mean_of(likeness(training, real), None)
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
    return _with(score, baselines), cosines


def varied(arms: Arms, groups: Sequence[int], *, against: str) -> Score | None:
    """Diversity of the pictures of one prompt; None where each prompt has one."""
    spreads = {arm: diversity(found, groups) for arm, found in arms.items()}
    several = ~np.isnan(next(iter(spreads.values())))
    if not several.any():
        return None
    return of_pictures(
        {arm: found[several] for arm, found in spreads.items()},
        range(int(several.sum())),
        against=against,
        title="Diversity",
        better=None,
        how="Mean 1 - cosine of the pictures of one prompt (as DIV of Ruiz et al. 2022, section "
        "4.3, which takes LPIPS). A subject is less varied than its class; near 0 every seed gives "
        "the same picture.",
    )


def class_kept(arms: Arms, groups: Sequence[int], real: np.ndarray) -> Score:
    """Prior preservation: how alike the class's pictures (N, d) are to the subject (M, d)."""
    return of_pictures(
        {arm: prior_preservation(found, real) for arm, found in arms.items()},
        groups,
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
    moved = found.relative if np.isfinite(found.relative).all() else found.distances
    score = Score(
        title="Forgetting",
        better="less",
        values={"finetuned": mean_of(moved, None)},
        how="1 - cosine of the pictures that base and fine-tuned model make of the same general "
        "prompts and seeds, as a share of that between two seeds of the base: 0 is the same "
        "picture, 1 as different as another seed makes it.",
        interval="95 % bootstrap over prompts",
        facts={"yardstick": found.yardstick, "prompts": len(base)},
    )
    return score, found.distances.tolist()


def _with(score: Score, more: Mapping[str, Value]) -> Score:
    return Score(**{**vars(score), "values": {**score.values, **more}})
