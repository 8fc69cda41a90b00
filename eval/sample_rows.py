"""What metrics.json says picture by picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.arms import Plan, Task
from eval.clip_score import unit
from eval.embedded import Embedded, Made
from eval.memorisation import Memorisation
from eval.scores import MAIN

if TYPE_CHECKING:
    from data.records import Record
    from eval.inputs import Given

SHOWN_PAIRS = 24


def described(copies: Memorisation | None, given: Given) -> dict[str, Any] | None:
    if copies is None:
        return None
    pairs = [
        {
            "sample": pair.sample,
            "id": given.training[pair.training].id,
            "similarity": pair.similarity,
            "suspicious": pair.suspicious,
        }
        for pair in copies.pairs[:SHOWN_PAIRS]
    ]
    content = {k: v for k, v in asdict(copies).items() if k != "pairs"}
    return {"flagged": copies.flagged, "said": copies.said, **content, "pairs": pairs}


def samples(
    plan: Plan,
    made: Made,
    given: Given,
    embedded: Embedded,
    rows: Mapping[str, Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    space = embedded.pictures["clip"]
    near = {
        which: nearest(space["finetuned"], space[which]) if which in space else None
        for which in ("training", "held_out")
    }
    records = {"training": given.training, "held_out": given.held_out}
    return [
        {
            "prompt": task.prompt,
            "class_prompt": task.class_prompt,
            "seed": task.seed,
            "size": list(task.size),
            "pictures": {arm: f"{arm}/{made[arm][k].name}" for arm in MAIN if arm in made},
            "scores": {
                name: {arm: float(values[k]) for arm, values in by_arm.items()}
                for name, by_arm in rows.items()
            },
            **{
                f"nearest_{which}": None
                if found is None
                else {"id": records[which][found[k][0]].id, "similarity": found[k][1]}
                for which, found in near.items()
            },
        }
        for k, task in enumerate(plan.samples)
    ]


def nearest(features: np.ndarray, reference: np.ndarray) -> list[tuple[int, float]]:
    """For each row (N, d) the index of the most similar reference (M, d) and their cosine."""
    similarity = unit(features) @ unit(reference).T
    best = similarity.argmax(axis=1).tolist()
    return [(index, float(similarity[row, index])) for row, index in enumerate(best)]


def beside(
    tasks: Sequence[Task],
    made: Made,
    folder: str,
    distances: Sequence[float] = (),
    *,
    scores: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> list[dict[str, Any]]:
    """The pictures that base and fine-tuned model made of each task, how far apart they are, and
    what each has for itself."""
    arms = ("base", "finetuned")
    return [
        {
            "prompt": task.prompt,
            "seed": task.seed,
            "size": list(task.size),
            "pictures": {arm: f"{folder}/{arm}/{made[f'{folder}/{arm}'][k].name}" for arm in arms},
            **({"distance": distances[k]} if len(distances) else {}),
            "scores": {
                name: {arm: float(values[k]) for arm, values in by_arm.items()}
                for name, by_arm in (scores or {}).items()
            },
        }
        for k, task in enumerate(tasks)
    ]


def about(records: Sequence[Record]) -> dict[str, Any] | None:
    if not records:
        return None
    digest = hashlib.sha256("".join(sorted(r.sha256 for r in records)).encode())
    return {"pictures": len(records), "sha256": digest.hexdigest()}
