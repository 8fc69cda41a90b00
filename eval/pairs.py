"""Pictures of an evaluation that are shown in pairs or in a row: beside their nearest real picture,
before and after, and at each scale or checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.galleries import Gallery, Sample, by_prompt, evenly, few
from eval.report import Comparison, Panel, heading, warning
from eval.score_table import figure as written

_PAIRS = 12  # nearest training pictures
_FEW = 8  # other pairs
_FILMS = 3  # prompts shown at each scale


def nearest_training(gallery: Gallery) -> str:
    """Generated pictures beside the training pictures they are most like, and what follows."""
    found = gallery.metrics.get("memorisation") or {}
    pairs = list(found.get("pairs") or _nearest(gallery.samples))[:_PAIRS]
    cards = [
        _pair(gallery, gallery.samples[pair["sample"]], "training", pair, "training picture")
        for pair in pairs
    ]
    title, said = "Nearest training pictures", str(found.get("said", ""))
    shown = few("", "", list(filter(None, cards)))
    if not shown and not said:
        return ""
    if found.get("flagged"):
        return heading(title) + warning(said) + shown
    return heading(title, f"{said} The most alike first." if shown else said) + shown


def nearest_held_out(gallery: Gallery) -> str:
    """Generated pictures beside the most similar real pictures that training never saw."""
    having = [sample for sample in gallery.samples if sample.get("nearest_held_out")]
    cards = [
        _pair(gallery, sample, "held_out", sample["nearest_held_out"], "held-out picture")
        for sample in evenly([group[0] for group in by_prompt(having)], _FEW)
    ]
    said = "What a picture is most like among the real ones that training did not see."
    title = "Nearest held-out pictures"
    return few(title, said, list(filter(None, cards)))


def forgotten(gallery: Gallery) -> str:
    """Prompts that have nothing to do with the training, before and after it."""
    said = "Prompts without what was trained: the closer the two pictures, the less was forgotten."
    return _before_and_after(gallery, "general", "What else changed", said)


def of_the_class(gallery: Gallery) -> str:
    """The class without the subject, before and after."""
    said = "Prompted with the class alone: these should not have become the subject."
    return _before_and_after(gallery, "prior", "Pictures of the class", said)


def in_motion(gallery: Gallery) -> str:
    """The same prompts at each scale of the adapter, and at each checkpoint that has pictures."""
    curves = gallery.metrics.get("curves") or {}
    return _films(
        gallery, "Adapter scales in pictures", "scale", curves.get("scales") or []
    ) + _films(gallery, "Checkpoints in pictures", "step", curves.get("checkpoints") or [])


def _nearest(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    found = [
        {"sample": index, **sample["nearest_training"]}
        for index, sample in enumerate(samples)
        if sample.get("nearest_training")
    ]
    return sorted(found, key=lambda pair: -pair["similarity"])


def _pair(
    gallery: Gallery, sample: Sample, kind: str, found: Mapping[str, Any], label: str
) -> Comparison | None:
    name = f"{label}, suspicious" if found.get("suspicious") else label
    made, real = gallery.made(sample, "finetuned"), gallery.actual(kind, found, name)
    prompt = str(sample.get("prompt") or "")
    return Comparison(prompt, [*made, *real]) if made and real else None


def _before_and_after(gallery: Gallery, kind: str, title: str, said: str) -> str:
    samples = evenly(gallery.metrics.get(kind) or [], _FEW)
    cards = [
        Comparison(str(sample["prompt"]), [*before, *after])
        for sample in samples
        if (before := gallery.made(sample, "base"))
        and (after := gallery.made(sample, "finetuned", _distance(sample)))
    ]
    return few(title, said, cards)


def _distance(sample: Sample) -> str:
    distance = sample.get("distance")
    return "" if distance is None else f"distance {written(distance, 3)}"


def _films(gallery: Gallery, title: str, what: str, points: Iterable[Mapping[str, Any]]) -> str:
    """Pictures k of all points in a row, for a few k."""
    shown = [point for point in points if point.get("pictures")]
    count = min((len(point["pictures"]) for point in shown), default=0)
    prompts = next((point["prompts"] for point in shown if point.get("prompts")), [""] * count)
    rows = [
        Comparison(
            str(prompts[k]),
            [
                Panel(path, f"{what} {point[what]:g}")
                for point in shown
                if (path := gallery.folder / point["pictures"][k]).is_file()
            ],
        )
        for k in evenly(range(count), _FILMS)
    ]
    said = f"The same prompt and noise at each {what}."
    return few(title, said, [row for row in rows if row.panels], film=True)
