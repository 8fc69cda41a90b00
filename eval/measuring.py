"""From pictures to the content of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
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
from eval.subject import prior_preservation

if TYPE_CHECKING:
    from eval.inputs import Given

Rows = dict[str, dict[str, np.ndarray]]
"""What every picture (N,) has for itself, by score and by arm: raw cosines."""
_LIKENESSES = {"dino": ("DINO", "dino"), "clip_i": ("CLIP-I", "clip")}  # title, and features
_TITLES = {"clip_score": "CLIP score", "clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino": "DINO"}


@dataclass(frozen=True)
class Evidence:
    """The pictures that were made and what they are measured by."""

    plan: Plan
    made: Made
    given: Given
    embedded: Embedded
    extractors: Extractors

    @cached_property
    def groups(self) -> list[int]:
        """Which samples are of the same prompt."""
        return label([task.prompt for task in self.plan.samples])

    @property
    def against(self) -> str:
        """What a subject's likeness is measured from: the base that was told what it is one of."""
        return "base_class" if "base_class" in self.made else "base"

    @property
    def space(self) -> str:
        """The features that see most of a picture."""
        return "dino" if "dino" in self.embedded.pictures else "clip"

    def subject(self, space: str) -> np.ndarray:
        """Features of the subject's real pictures: held-out ones, or else those trained on."""
        held_out = self.embedded.real(space, "held_out")
        return held_out if len(held_out) else self.embedded.real(space, "training")

    @cached_property
    def class_likeness(self) -> dict[str, np.ndarray]:
        """How alike each picture of the class (N,) is to the subject, by arm; empty without."""
        real, space = self.subject(self.space), self.embedded.pictures[self.space]
        if not self.plan.prior or not len(real):
            return {}
        arms = ("base", "finetuned")
        return {arm: prior_preservation(space[f"prior/{arm}"], real) for arm in arms}

    @cached_property
    def forgotten(self) -> tuple[Score, list[float]] | None:
        """How far the general pictures moved, and each by itself; None without."""
        if not self.plan.general:
            return None
        space = self.embedded.pictures[self.space]
        arms = (space[f"general/{arm}"] for arm in ("base", "finetuned", "other_seed"))
        return subject_scores.forgotten(*arms)

    def cosines(self, arms: Sequence[str]) -> Rows:
        """Of each picture with its prompt and, of a subject, with what it should show."""
        tasks = self.plan.samples
        named = [arm for arm in arms if arm != "base_class"]  # which has prompts of its own
        found = {"clip_score": self._with([task.prompt for task in tasks], named)}
        if all(task.described for task in tasks):
            found["clip_t"] = self._with([str(task.described) for task in tasks], arms)
        return found

    def _with(self, texts: Sequence[str], arms: Sequence[str]) -> dict[str, np.ndarray]:
        rows = np.stack([self.embedded.texts[text] for text in texts])
        clip = self.embedded.pictures["clip"]
        return {arm: clip_score(clip[arm], rows) for arm in arms if arm in self.made}


OTHERS: list[Callable[[Evidence], Mapping[str, Score]]] = []
"""Metrics of others (docs/extending.md), at the end of the table."""


def _new(own: Mapping[str, Score], known: Mapping[str, Score]) -> Mapping[str, Score]:
    """Raises ValueError for a name that another score has."""
    if taken := sorted({*own} & {*known, "copies"}):
        raise ValueError(f"a metric of OTHERS is called {taken[0]}, as another score is: rename it")
    return own


def measure(found: Evidence, *, seed: int) -> dict[str, Any]:
    """All of metrics.json but `title`, `settings` and the checkpoints' curve."""
    plan, given = found.plan, found.given
    rows, copies = found.cosines(MAIN), _copies(found, seed=seed)
    _, moved = found.forgotten or (None, [])
    scores = {**_likenesses(found, rows), **_distances(found, seed=seed), **_texts(found, rows)}
    scores |= _lost(found)
    for other in OTHERS:
        scores |= _new(other(found), scores)
    if copies is not None and copies.judged:
        scores["copies"] = _copies_score(copies)
    scores = _ordered(scores)
    keep, sentence = verdicts.judge(scores, copies=_suspicion(copies), subject=given.likeness_to)
    return {
        "format": FORMAT,
        "keep": keep,
        "verdict": sentence,
        "warnings": [
            *given.notes,
            *verdicts.warnings(prompts=len(set(found.groups)), cut_prompts=found.embedded.cut),
        ],
        "arms": {arm: ARMS[arm] for arm in ARMS if any(arm in s.values for s in scores.values())},
        "scores": {name: score.as_dict() for name, score in scores.items()},
        "power": _power(found, rows),
        "samples": sample_rows.samples(plan, found.made, given, found.embedded, rows),
        "general": sample_rows.beside(plan.general, found.made, "general", moved),
        "prior": sample_rows.beside(
            plan.prior, found.made, "prior", scores={"prior_preservation": found.class_likeness}
        ),
        "memorisation": sample_rows.described(copies, given),
        "curves": {"checkpoints": [], "scales": _sweep(found)},
        "extractors": found.extractors.describe(),
        "reference": sample_rows.about(given.held_out),
        "training": sample_rows.about(given.training),
    }


def quick_scores(found: Evidence) -> dict[str, float]:
    """The values alone, of the fine-tuned pictures alone, of what training can choose by."""
    from eval.frechet import frechet_from_features
    from eval.kernel_distances import cmmd, kid

    cosines = found.cosines(["finetuned"])
    values = {name: float(points(by_arm["finetuned"]).mean()) for name, by_arm in cosines.items()}
    for name, (_, space) in _LIKENESSES.items():
        if found.given.subject and space in found.embedded.pictures and len(found.subject(space)):
            pictures = found.embedded.pictures[space]["finetuned"]
            values[name] = float(subject_scores.likeness(pictures, found.subject(space)).mean())
    if found.given.is_of_captions:
        pictures = found.embedded.pictures["features"]["finetuned"]
        reference = found.embedded.real("features", "held_out")
        values["kid"] = kid(pictures, reference).value
        clip = found.embedded.pictures["clip"]
        values["cmmd"] = cmmd(clip["finetuned"], clip["held_out"]).unbiased
        values["fid"] = frechet_from_features(pictures, reference)
    return values


def _likenesses(found: Evidence, rows: Rows) -> dict[str, Score]:
    """How alike the subject is; adds each picture's to `rows`."""
    scores = {}
    for name, (title, space) in _LIKENESSES.items():
        if not found.given.subject or space not in found.embedded.pictures:
            continue
        if len(found.subject(space)):
            scores[name], rows[name] = subject_scores.alike(
                found.embedded.of(space, MAIN),
                found.groups,
                held_out=found.embedded.real(space, "held_out"),
                training=found.embedded.real(space, "training"),
                title=title,
                against=found.against,
            )
    return scores


def _distances(found: Evidence, *, seed: int) -> dict[str, Score]:
    """From the held-out pictures, where their captions are what was prompted."""
    if not found.given.is_of_captions:
        return {}
    captions = [record.captions[0] for record in found.given.held_out]
    labels = label([*(task.prompt for task in found.plan.samples), *captions])
    return distance_scores.scores(
        found.embedded.real("features", "held_out"),
        found.embedded.of("features", ("base", "finetuned")),
        groups=labels[: len(found.groups)],
        of_reference=labels[len(found.groups) :],
        extractor=found.extractors.features.describe(),
        clip=distance_scores.Features(
            found.embedded.real("clip", "held_out"),
            found.embedded.of("clip", ("base", "finetuned")),
            found.extractors.clip.describe(),
        ),
        classes=found.embedded.classes,
        seed=seed,
    )


def _texts(found: Evidence, rows: Rows) -> dict[str, Score]:
    scores = {"clip_score": prompt_scores.clip_score(rows["clip_score"], found.groups)}
    if "clip_t" in rows:
        scores["clip_t"] = prompt_scores.clip_t(rows["clip_t"], found.groups, against=found.against)
    return scores


def _lost(found: Evidence) -> dict[str, Score]:
    """What training may have cost: variety, the class, everything else."""
    scores: dict[str, Score] = {}
    if found.given.subject:
        arms = found.embedded.of(found.space, MAIN)
        spread = subject_scores.varied(arms, found.groups, against=found.against)
        scores |= {"diversity": spread} if spread is not None else {}
    if found.class_likeness:
        scores["prior_preservation"] = subject_scores.class_kept(found.class_likeness)
    if found.forgotten is not None:
        scores["forgetting"] = found.forgotten[0]
    return scores


def _ordered(scores: Mapping[str, Score]) -> dict[str, Score]:
    """What tells most comes first, and a subject's scores tell most of a subject."""
    distances = [name for name in scores if name in verdicts.DISTANCES]
    subject = [name for name in scores if name in verdicts.LIKENESSES]
    first = [*subject, "clip_t"] if subject else [*distances, "clip_score"]
    then = ["copies", "prior_preservation", "forgetting", *distances, "clip_score", "diversity"]
    names = dict.fromkeys([*first, *then, *scores])
    return {name: scores[name] for name in names if name in scores}


def _copies(found: Evidence, *, seed: int) -> Memorisation | None:
    """The most suspicious of how the results lie to the training pictures, by features and by
    pixels."""
    given = found.given
    if not given.training:
        return None
    which = ("finetuned", "training", "held_out")
    spaces = {
        space: tuple(found.embedded.real(space, one) for one in which)
        for space in ("clip", "dino")
        if space in found.embedded.pictures
    }
    seen, views = (Fitted(records, given.buckets) for records in (given.training, given.held_out))
    spaces["layout"] = tuple(map(layout, (_read(found.made["finetuned"]), seen, views)))
    # CLIP and DINO hardly know a picture from its mirror image.
    twins = {"layout": layout(picture[:, ::-1] for picture in seen)} if given.mirrored else {}
    return most_suspicious(
        [
            memorisation(
                pictures,
                training,
                held_out=real if given.held_out else None,
                groups=found.groups,
                prompted=given.is_of_captions,
                twins=twins.get(space),
                seed=seed,
                space=space,
            )
            for space, (pictures, training, real) in spaces.items()
        ]
    )


def _suspicion(copies: Memorisation | None) -> verdicts.Copying:
    if copies is None:
        return "no"
    # Of other prompts than real captions it is not known how near a good answer comes.
    doubtful = copies.doubtful and copies.prompted
    return "yes" if copies.flagged else "maybe" if doubtful else "no"


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
        warning=copies.note,
        facts={"expected": copies.expected, "p": copies.p, "space": copies.space},
    )


def _power(found: Evidence, rows: Rows) -> list[str]:
    """What differences could be seen, per score that pictures have."""
    said = []
    for name, by_arm in rows.items():
        shown = 100 if name in ("clip_score", "clip_t") else 1
        before = by_arm.get(found.against, by_arm["base"])
        changes = shown * (by_arm["finetuned"] - before)
        said.append(f"{_TITLES[name]}: {hint(changes, found.groups)}")
    return said


def _sweep(found: Evidence) -> list[dict[str, Any]]:
    """Scores and pictures of some prompts at each scale."""
    tasks, clip = found.plan.swept, found.embedded.pictures["clip"]
    texts = [found.embedded.texts[task.described or task.prompt] for task in tasks]
    swept = []
    for scale, arm in found.plan.sweep().items():
        if arm not in clip:
            continue
        values = {
            "clip_t" if tasks[0].described else "clip_score": points(
                clip_score(clip[arm], np.stack(texts))
            )
        }
        if found.given.subject and len(found.subject("clip")):
            values["clip_i"] = subject_scores.likeness(clip[arm], found.subject("clip"))
        means = {name: asdict(prompt_scores.mean_of(each, None)) for name, each in values.items()}
        pictures = [f"{arm}/{path.name}" for path in found.made[arm]]
        prompts = [task.prompt for task in tasks]
        swept.append({"scale": scale, "scores": means, "pictures": pictures, "prompts": prompts})
    return swept
