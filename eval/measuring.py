"""From pictures to the content of metrics.json: embeds everything once, then scores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import distance_scores, prompt_scores, sample_rows, subject_scores, verdicts
from eval.arms import Plan
from eval.clip_score import clip_score, points
from eval.embedded import Embedded, Extractors, Fitted, Made
from eval.memorisation import Memorisation, layout, memorisation, most_suspicious
from eval.prompt_scores import label
from eval.scores import ARMS, FORMAT, MAIN, Score, Value
from eval.significance import hint

if TYPE_CHECKING:
    from eval.inputs import Given


def measure(
    plan: Plan, made: Made, given: Given, embedded: Embedded, extractors: Extractors, *, seed: int
) -> dict[str, Any]:
    """All of metrics.json but `title`, `settings` and the checkpoints' curve."""
    groups = label([task.prompt for task in plan.samples])
    against = "base_class" if "base_class" in made else "base"
    cosines = _cosines(plan, made, embedded)
    scores, rows = _scores_of_samples(plan, given, embedded, extractors, cosines, seed=seed)
    copies = _copies(plan, made, given, embedded, groups, seed=seed)
    scores |= _of_the_rest(plan, embedded, against)
    if copies is not None and copies.judged:
        scores["copies"] = _copies_score(copies)
    scores = _ordered(scores)
    flagged = copies is not None and copies.flagged
    keep, sentence = verdicts.judge(scores, copies=flagged)
    distances = _forgotten(plan, embedded)
    return {
        "format": FORMAT,
        "keep": keep,
        "verdict": sentence,
        "warnings": [
            *given.notes,
            *verdicts.warnings(prompts=len(set(groups)), cut_prompts=embedded.cut),
        ],
        "arms": {arm: ARMS[arm] for arm in ARMS if any(arm in s.values for s in scores.values())},
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "power": _power(cosines, rows, groups, against),
        "samples": sample_rows.samples(plan, made, given, embedded, rows),
        "general": [
            sample_rows.shown(task, made, "general", k) | {"distance": distances[k]}
            for k, task in enumerate(plan.general)
        ],
        "prior": [sample_rows.shown(task, made, "prior", k) for k, task in enumerate(plan.prior)],
        "memorisation": sample_rows.described(copies, given),
        "curves": {"checkpoints": [], "scales": _sweep(plan, made, embedded, given)},
        "extractors": extractors.describe(),
        "reference": sample_rows.about(given.held_out),
        "training": sample_rows.about(given.training),
    }


def _ordered(scores: Mapping[str, Score]) -> dict[str, Score]:
    """What tells most comes first, and a subject's scores tell most of a subject."""
    distances = [name for name in scores if name in verdicts.DISTANCES]
    subject = [name for name in scores if name in verdicts.LIKENESSES]
    first = [*subject, "clip_t"] if subject else [*distances, "clip_score"]
    then = ["copies", "prior_preservation", "forgetting", *distances, "clip_score", "diversity"]
    names = dict.fromkeys([*first, *then, *scores])
    return {name: scores[name] for name in names if name in scores}


def _scores_of_samples(
    plan: Plan,
    given: Given,
    embedded: Embedded,
    extractors: Extractors,
    cosines: Mapping[str, Mapping[str, np.ndarray]],
    *,
    seed: int = 0,
) -> tuple[dict[str, Score], dict[str, Mapping[str, np.ndarray]]]:
    """The scores of the samples, the leading one first; and those that each picture has, by arm."""
    groups = label([task.prompt for task in plan.samples])
    found: dict[str, Score] = {}
    rows: dict[str, Mapping[str, np.ndarray]] = dict(cosines)
    against = "base_class" if "base_class" in embedded.pictures["clip"] else "base"
    for name, title in (("dino", "DINO"), ("clip_i", "CLIP-I")) if given.subject else ():
        space = "dino" if name == "dino" else "clip"
        real = (
            [embedded.real(space, w) for w in ("held_out", "training")]
            if (space in embedded.pictures)
            else []
        )
        if not real or not any(map(len, real)):
            continue
        found[name], rows[name] = subject_scores.alike(
            embedded.of(space, MAIN),
            groups,
            held_out=real[0],
            training=real[1],
            title=title,
            against=against,
        )
    if given.protocol is None and given.held_out:
        captions = [record.captions[0] for record in given.held_out]
        labels = label([*(task.prompt for task in plan.samples), *captions])
        found |= distance_scores.scores(
            embedded.real("features", "held_out"),
            embedded.of("features", ("base", "finetuned")),
            groups=labels[: len(groups)],
            of_reference=labels[len(groups) :],
            extractor=extractors.features.describe(),
            classes=embedded.classes,
            seed=seed,
        )
    if "clip_t" in cosines:
        found["clip_t"] = prompt_scores.clip_t(cosines["clip_t"], groups, against=against)
    found["clip_score"] = prompt_scores.clip_score(cosines["clip_score"], groups)
    return found, rows


def quick_scores(plan: Plan, given: Given, embedded: Embedded) -> dict[str, float]:
    """The values alone, of the fine-tuned pictures alone, of what training can choose by."""
    from eval.frechet import frechet_from_features
    from eval.kernel_distances import cmmd, kid

    found: dict[str, float] = {}
    texts: dict[str, list[str | None]] = {
        "clip_score": [task.prompt for task in plan.samples],
        "clip_t": [task.described for task in plan.samples],
    }
    for name, wanted in texts.items():
        if all(wanted):
            rows = np.stack([embedded.texts[str(text)] for text in wanted])
            cosines = clip_score(embedded.pictures["clip"]["finetuned"], rows)
            found[name] = float(points(cosines).mean())
    for name, space in (("clip_i", "clip"), ("dino", "dino")) if given.subject else ():
        if space in embedded.pictures:
            real = _subject(embedded, space)
            if len(real):
                likeness = subject_scores.likeness(embedded.pictures[space]["finetuned"], real)
                found[name] = float(likeness.mean())
    if given.protocol is None and given.held_out:
        pictures = embedded.pictures["features"]["finetuned"]
        reference = embedded.real("features", "held_out")
        found["kid"] = kid(pictures, reference).value
        found["cmmd"] = cmmd(pictures, reference)[1]
        found["fid"] = frechet_from_features(pictures, reference)
    return found


def _subject(embedded: Embedded, space: str) -> np.ndarray:
    """The real pictures of the subject: held-out ones, or else those trained on; (0, d) without."""
    held_out = embedded.real(space, "held_out")
    return held_out if len(held_out) else embedded.real(space, "training")


def _cosines(plan: Plan, made: Made, embedded: Embedded) -> dict[str, dict[str, np.ndarray]]:
    """Of each picture with its prompt, and with what it should show, by arm."""

    def of(arm: str, texts: Sequence[str | None]) -> np.ndarray:
        rows = np.stack([embedded.texts[str(text)] for text in texts])
        return clip_score(embedded.pictures["clip"][arm], rows)

    prompts = [task.prompt for task in plan.samples]
    found = {"clip_score": {arm: of(arm, prompts) for arm in ("base", "finetuned") if arm in made}}
    described = [task.described for task in plan.samples]
    if all(described):
        found["clip_t"] = {arm: of(arm, described) for arm in MAIN if arm in made}
    return found


def _of_the_rest(plan: Plan, embedded: Embedded, against: str) -> dict[str, Score]:
    """What does not follow from the samples alone."""
    found: dict[str, Score] = {}
    groups = label([task.prompt for task in plan.samples])
    space = "dino" if "dino" in embedded.pictures else "clip"
    spread = subject_scores.varied(embedded.of(space, MAIN), groups, against=against)
    if spread is not None:
        found["diversity"] = spread
    real = _subject(embedded, space)
    if plan.prior and len(real):
        arms = {arm: embedded.pictures[space][f"prior/{arm}"] for arm in ("base", "finetuned")}
        found["prior_preservation"] = subject_scores.class_kept(
            arms, label([task.prompt for task in plan.prior]), real
        )
    if plan.general:
        found["forgetting"], _ = _forgetting(embedded, space)
    return found


def _forgetting(embedded: Embedded, space: str) -> tuple[Score, list[float]]:
    found = embedded.pictures[space]
    return subject_scores.forgotten(
        found["general/base"], found["general/finetuned"], found["general/other_seed"]
    )


def _forgotten(plan: Plan, embedded: Embedded) -> list[float]:
    space = "dino" if "dino" in embedded.pictures else "clip"
    return _forgetting(embedded, space)[1] if plan.general else []


def _copies(
    plan: Plan,
    made: Made,
    given: Given,
    embedded: Embedded,
    groups: Sequence[int],
    *,
    seed: int,
) -> Memorisation | None:
    """The most suspicious of how the results lie to the training pictures, by features and by
    pixels."""
    if not given.training:
        return None
    held_out = bool(given.held_out)
    spaces = {
        space: tuple(embedded.real(space, which) for which in ("finetuned", "training", "held_out"))
        for space in ("clip", "dino")
        if space in embedded.pictures
    }
    real = Fitted(given.training, given.buckets), Fitted(given.held_out, given.buckets)
    spaces["layout"] = layout(_read(made["finetuned"])), layout(real[0]), layout(real[1])
    return most_suspicious(
        [
            memorisation(
                found,
                training,
                held_out=views if held_out else None,
                groups=groups,
                seed=seed,
                space=space,
            )
            for space, (found, training, views) in spaces.items()
        ]
    )


def _read(paths: Sequence[Path]) -> list[np.ndarray]:
    from eval.features import read_rgb

    return [read_rgb(path) for path in paths]


def _copies_score(copies: Memorisation) -> Score:
    return Score(
        title="Copies",
        better="less",
        values={"finetuned": Value(copies.share, copies.low, copies.high)},
        how="Share of the pictures that are nearer to one training picture, and more so than to "
        "the others, than real pictures are. A model that does not copy would have about "
        f"{copies.expected:.0%}.",
        interval="95 %, over prompts",
        facts={"expected": copies.expected, "p": copies.p, "space": copies.space},
    )


def _power(
    cosines: Mapping[str, Mapping[str, np.ndarray]],
    rows: Mapping[str, Mapping[str, np.ndarray]],
    groups: Sequence[int],
    against: str,
) -> list[str]:
    """What differences could be seen, per score that pictures have."""
    titles = {"clip_score": "CLIP score", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}
    found = []
    for name, by_arm in rows.items():
        before = by_arm.get(against, by_arm.get("base"))
        if before is not None and "finetuned" in by_arm:
            factor = 100 if name in cosines else 1  # as they are shown
            found.append(f"{titles[name]}: {hint(factor * (by_arm['finetuned'] - before), groups)}")
    return found


def _sweep(plan: Plan, made: Made, embedded: Embedded, given: Given) -> list[dict[str, Any]]:
    """Scores and pictures of some prompts at each scale."""
    tasks = plan.swept
    real = _subject(embedded, "clip")
    found = []
    for scale in plan.scales:
        arm = f"scale-{scale:g}"
        pictures = embedded.pictures["clip"].get(arm)
        if pictures is None:
            continue
        texts = np.stack([embedded.texts[task.described or task.prompt] for task in tasks])
        values = {"clip_t" if given.subject else "clip_score": 100 * clip_score(pictures, texts)}
        if len(real) and given.subject:
            values["clip_i"] = subject_scores.likeness(pictures, real)
        found.append(
            {
                "scale": scale,
                "scores": {
                    name: asdict(prompt_scores.mean_of(each, None)) for name, each in values.items()
                },
                "pictures": [f"{arm}/{path.name}" for path in made[arm]],
                "prompts": [task.prompt for task in tasks],
            }
        )
    return found
