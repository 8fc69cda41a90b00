"""From features to numbers: FID and CLIP score of base and fine-tuned, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.clip_score import CONVENTION, clip_score, points, summarise, unit
from eval.figures import number, signed
from eval.frechet import (
    Moments,
    bootstrap,
    expected_bias,
    frechet_distance,
    small_sample_warning,
)

_RESAMPLES = 100  # of the FID: enough for a standard deviation, seconds at 768 dimensions


def score(
    reference: np.ndarray,
    base: np.ndarray,
    finetuned: np.ndarray,
    texts: np.ndarray,
    prompts: Sequence[str],
    captions: Sequence[str],
    *,
    seed: int = 0,
) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """FID and CLIP score with intervals (base, finetuned, change), and the N pairs of raw cosines.

    `reference` (M, d): embeddings of the held-out pictures; `base`, `finetuned`, `texts` (N, d): of
    the generated pictures and of the text of each; `prompts` (N) and `captions` (M) are the texts
    of generated and held-out pictures: rows of one text are resampled together.
    """
    labels = _labels([*prompts, *captions])
    groups, of_reference = labels[: len(prompts)], labels[len(prompts) :]
    cosines = clip_score(base, texts), clip_score(finetuned, texts)
    scores = {
        "fid": _fid(reference, base, finetuned, groups, of_reference, seed),
        "clip_score": _clip_scores(*cosines, groups, seed),
    }
    return scores, list(zip(cosines[0].tolist(), cosines[1].tolist(), strict=True))


def nearest(features: np.ndarray, reference: np.ndarray) -> list[tuple[int, float]]:
    """For each row (N, d) the index of the most similar reference (M, d) and their cosine."""
    similarity = unit(features) @ unit(reference).T
    best = similarity.argmax(axis=1).tolist()
    return [(index, float(similarity[row, index])) for row, index in enumerate(best)]


def verdict(metrics: dict[str, Any]) -> str:
    """What the numbers say, in one sentence; a change whose interval holds 0 is called unclear."""
    fid, clip = metrics["fid"], metrics["clip_score"]
    closer = _direction(fid["change"])
    matches = _direction(clip["change"])
    moved = {
        -1: "Fine-tuning brought the pictures closer to the held-out ones",
        0: "Fine-tuning did not clearly change how close the pictures are to the held-out ones",
        1: "Fine-tuning took the pictures further from the held-out ones",
    }[closer]
    follow = {
        -1: "they follow the prompts less well",
        0: "they follow the prompts about as well as before",
        1: "they follow the prompts better",
    }[matches]
    link = "but" if (closer < 0) == (matches < 0) and closer else "and"
    distance, agreement = _moved(fid, "value"), _moved(clip, "mean")
    return f"{moved} (FID {distance}), {link} {follow} (CLIP score {agreement})."


def warnings(metrics: dict[str, Any], *, cut_prompts: int = 0) -> list[str]:
    """What a reader of these numbers must know, as sentences."""
    fid = metrics["fid"]
    n, m, bias = fid["pictures"], fid["references"], fid["bias_estimate"]
    found = [small_sample_warning(fid["dimension"], n, m)]
    if bias > 0.1 * min(fid["base"]["value"], fid["finetuned"]["value"]):
        found.append(
            f"Two sets as small as these ({n} and {m} pictures), drawn independently from one and "
            f"the same distribution, would already have an FID of about {number(bias)}: read the "
            "change, not the value, and compare it only with runs of the same counts."
        )
    if metrics["clip_score"]["base"]["groups"] < 50:
        found.append(
            f"There are only {metrics['clip_score']['base']['groups']} different prompts: the "
            "intervals are rough."
        )
    if cut_prompts:
        found.append(f"{cut_prompts} prompts are longer than CLIP reads: their end is not scored.")
    return [sentence for sentence in found if sentence]


def _fid(
    reference: np.ndarray,
    base: np.ndarray,
    finetuned: np.ndarray,
    groups: list[int],
    of_reference: list[int],
    seed: int,
) -> dict[str, Any]:
    real = Moments.of(reference)
    values = [frechet_distance(Moments.of(features), real) for features in (base, finetuned)]
    spread = bootstrap(
        reference,
        base,
        finetuned,
        groups=groups,
        reference_groups=of_reference,
        resamples=_RESAMPLES,
        seed=seed,
    )
    return {
        "base": _around(values[0], spread[:, 0], floor=0.0),
        "finetuned": _around(values[1], spread[:, 1], floor=0.0),
        "change": _around(values[1] - values[0], spread[:, 1] - spread[:, 0]),
        "bias_estimate": expected_bias(np.linalg.eigvalsh(real.cov), len(base), len(reference)),
        "pictures": len(base),
        "references": len(reference),
        "dimension": reference.shape[1],
        "interval": "value -/+ 1.96 standard deviations, bootstrap over prompts",
        "resamples": _RESAMPLES,
    }


def _clip_scores(
    base: np.ndarray, finetuned: np.ndarray, groups: list[int], seed: int
) -> dict[str, Any]:
    before, after = points(base), points(finetuned)
    return {
        "base": summarise(before, groups, seed=seed).as_dict(),
        "finetuned": summarise(after, groups, seed=seed).as_dict(),
        "change": summarise(after - before, groups, seed=seed).as_dict(),
        "convention": CONVENTION,
        "interval": "95 % bootstrap percentiles over prompts, 2000 resamples",
    }


def _labels(prompts: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    return [first.setdefault(prompt, len(first)) for prompt in prompts]


def _around(value: float, resampled: np.ndarray, floor: float = -np.inf) -> dict[str, float]:
    half = 1.96 * float(resampled.std(ddof=1))
    return {"value": value, "low": max(value - half, min(floor, value)), "high": value + half}


def _direction(change: dict[str, float]) -> int:
    return int(change["low"] > 0) - int(change["high"] < 0)


def _moved(scores: dict[str, Any], key: str) -> str:
    before, after = scores["base"][key], scores["finetuned"][key]
    share = f", {signed(100 * (after - before) / before, '.1f')} %" if before > 0 else ""
    return f"{number(before)} to {number(after)}{share}"
