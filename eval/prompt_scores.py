"""Scores that every picture has for itself: how well it follows its prompt, how alike a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from eval.clip_score import CONVENTION, points
from eval.scores import Change, Score, Value
from eval.significance import interval, paired

BY_PROMPT = "95 % bootstrap over prompts"


def label(texts: Sequence[str]) -> list[int]:
    """A number for each text, the same for the same."""
    first: dict[str, int] = {}
    return [first.setdefault(text, len(first)) for text in texts]


def of_pictures(
    values: Mapping[str, np.ndarray],
    groups: Sequence[int],
    *,
    title: str,
    better: Literal["less", "more"] | None,
    how: str,
    against: str = "base",
    **more: Any,
) -> Score:
    """A score from the values (N,) of each arm, row by row of the same prompt and seed.

    groups: (N) labels of the prompts, which are what is drawn for the intervals. against: the arm
    that the change is measured from.
    """
    by = more.pop("interval", BY_PROMPT)
    facts = {"prompts": len(set(groups)), "pictures": len(groups), **more.pop("facts", {})}
    change = None
    if against in values and "finetuned" in values:
        change = changed(values[against], values["finetuned"], groups)
    return Score(
        title=title,
        better=better,
        values={arm: mean_of(found, groups) for arm, found in values.items()},
        how=how,
        change=change,
        against=against,
        interval=by,
        facts=facts,
        **more,
    )


def mean_of(values: np.ndarray, groups: Sequence[int] | None) -> Value:
    """The mean of values (N,) with its interval, where there are several groups."""
    found = interval(values, groups)
    return Value(found.mean, found.low, found.high, found.n)


def changed(before: np.ndarray, after: np.ndarray, groups: Sequence[int]) -> Change | None:
    """The paired change; None where there is only one prompt."""
    found = paired(before, after, groups)
    if found.low is None or found.high is None:
        return None
    return Change(found.difference, found.low, found.high, found.p, found.effect)


def clip_score(cosines: Mapping[str, np.ndarray], groups: Sequence[int]) -> Score:
    """From the raw cosines (N,) of each arm's pictures with their prompts."""
    return of_pictures(
        {arm: points(found) for arm, found in cosines.items()},
        groups,
        title="CLIP score",
        better="more",
        how=f"{CONVENTION} of CLIP's embeddings of each picture and its prompt (Hessel et al. "
        "2021).",
        facts={"convention": CONVENTION},
    )


def clip_t(cosines: Mapping[str, np.ndarray], groups: Sequence[int], *, against: str) -> Score:
    """Of a subject: from the cosines with the prompt in words that a CLIP knows."""
    return of_pictures(
        {arm: points(found) for arm, found in cosines.items()},
        groups,
        against=against,
        title="CLIP-T",
        better="more",
        how=f"{CONVENTION} of CLIP's embeddings of each picture and its prompt with the class in "
        "place of the subject's own word, which no CLIP knows (Ruiz et al. 2022, section 4.2).",
        facts={"convention": CONVENTION},
    )
