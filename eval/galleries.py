"""The pictures of an evaluation as sections of its report: chosen evenly or by a score, never by
hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_score import points
from eval.report import (
    THUMBNAIL,
    Comparison,
    Grid,
    Panel,
    Section,
    figure,
    grids_of,
    section_of,
)
from eval.score_table import decimals, scores_of
from eval.score_table import figure as written
from eval.scores import MAIN, Score

Sample = Mapping[str, Any]
RealPicture = Callable[[str, str], "np.ndarray | None"]
"""("training" or "held_out", id) -> uint8 (H, W, 3), None where it is not to be had."""

_PROMPTS, _SEEDS = 12, 4  # of the grids
_EXTREMES = 4  # prompts that gained most, and that lost most


@dataclass(frozen=True)
class Lead:
    """A score that single pictures have, and the arm its change is measured from."""

    key: str
    score: Score
    against: str

    def value(self, sample: Sample, arm: str) -> float | None:
        """Of one picture, in the unit of the main table."""
        cosine = sample.get("scores", {}).get(self.key, {}).get(arm)
        if cosine is None or "convention" not in self.score.facts:
            return cosine
        return float(points(np.array(cosine)))

    def change(self, sample: Sample) -> float | None:
        before, after = self.value(sample, self.against), self.value(sample, "finetuned")
        return None if before is None or after is None else after - before

    def mean_change(self, group: Sequence[Sample]) -> float:
        """Of the pictures of one prompt; 0 where it is not known."""
        found = [c for sample in group if (c := self.change(sample)) is not None]
        return sum(found) / len(found) if found else 0.0

    def text(self, value: float, *, sign: bool = False) -> str:
        digits = min(3, decimals(self.score))
        return written(value, digits, sign=sign)


@dataclass(frozen=True)
class Gallery:
    """A metrics.json and where its pictures are."""

    metrics: Mapping[str, Any]
    folder: Path
    real: RealPicture

    @property
    def samples(self) -> list[Sample]:
        return list(self.metrics.get("samples", []))

    @property
    def arms(self) -> dict[str, str]:
        """Titles of the arms whose pictures were generated."""
        named = self.metrics.get("arms", {})
        return {arm: str(title) for arm, title in named.items() if arm in MAIN}

    @cached_property
    def lead(self) -> Lead | None:
        """The most telling score that single pictures have, before and after."""
        for key, score in scores_of(self.metrics).items():
            lead = Lead(key, score, score.against)
            if any(lead.change(sample) is not None for sample in self.samples):
                return lead
        return None

    def made(self, sample: Sample, arm: str, note: str = "") -> list[Panel]:
        """The picture of one arm, or nothing."""
        file = sample.get("pictures", {}).get(arm)
        path = self.folder / file if file else None
        name = self.arms.get(arm, arm)
        return [Panel(path, name, note)] if path is not None and path.is_file() else []

    def actual(self, kind: str, found: Mapping[str, Any], label: str) -> list[Panel]:
        """The real picture of {"id", "similarity"}, or nothing."""
        picture = self.real(kind, str(found["id"]))
        alike = f"similarity {written(found['similarity'], 3)}"
        return [] if picture is None else [Panel(picture, label, alike)]


def strip(gallery: Gallery, count: int) -> str:
    """So many prompts by base and fine-tuned model, for the first screen."""
    chosen = evenly([group[0] for group in by_prompt(gallery.samples)], count)
    cards = []
    for sample in chosen:
        panels = [p for arm in ("base", "finetuned") for p in gallery.made(sample, arm)]
        prompt = str(sample.get("prompt") or "")
        pictures = "".join(figure(panel, prompt, THUMBNAIL) for panel in panels)
        if pictures:
            title = f'<p title="{escape(prompt)}">{escape(prompt)}</p>' if prompt else ""
            cards.append(f'<div>{title}<div class="row">{pictures}</div></div>')
    return f'<div class="strip">{"".join(cards)}</div>' if cards else ""


def prompts_and_seeds(gallery: Gallery) -> str:
    """Rows of models and columns of seeds for prompts that are spread evenly."""
    groups = by_prompt(gallery.samples)
    if not any(group[0].get("prompt") for group in groups):
        return ""
    chosen = evenly(groups, _PROMPTS)
    all_of_them = len(chosen) == len(groups)
    count = f"{len(chosen)} of {len(groups)} prompts, evenly spaced, not picked"
    said = f"{f'All {len(groups)} prompts' if all_of_them else count}. {_explained(gallery)}"
    return _groups(gallery, "Side by side", said, chosen, gallery.arms)


def extremes(gallery: Gallery) -> str:
    """The prompts that gained and that lost most in the leading score."""
    lead = gallery.lead
    if lead is None or lead.score.better is None:
        return ""
    sign = -1 if lead.score.better == "less" else 1
    found = [(sign * lead.mean_change(group), group) for group in by_prompt(gallery.samples)]
    found.sort(key=lambda one: one[0])
    lost = [group for value, group in found if value < 0][:_EXTREMES]
    won = [group for value, group in reversed(found) if value > 0][:_EXTREMES]
    arms = {arm: name for arm, name in gallery.arms.items() if arm in (lead.against, "finetuned")}
    named = " against ".join(f"\u201c{name}\u201d" for name in reversed(arms.values()))
    by = f"By {lead.score.title}, {named}, averaged over the pictures of a prompt."
    return "".join(
        _groups(gallery, title, by, groups, arms)
        for title, groups in (("Prompts that gained most", won), ("Prompts that lost most", lost))
    )


def by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples of one prompt together, in order; one without a prompt stands alone."""
    groups: dict[Any, list[Sample]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.get("prompt") or index, []).append(sample)
    return list(groups.values())


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced from the first on."""
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


def _groups(
    gallery: Gallery,
    title: str,
    explanation: str,
    groups: Sequence[Sequence[Sample]],
    arms: Mapping[str, str],
) -> str:
    """Grids where prompts have several seeds, else cards of pictures side by side."""
    if sum(map(len, groups)) > 1.5 * len(groups):
        drawn = [_grid(gallery, group, arms) for group in groups]
        return grids_of(title, explanation, [grid for grid in drawn if grid.rows])
    cards = [
        Comparison(
            str(sample.get("prompt") or ""),
            [p for arm in arms for p in gallery.made(sample, arm, _score(gallery, sample, arm))],
        )
        for sample, *_ in groups
    ]
    return few(title, explanation, [card for card in cards if card.panels])


def few(title: str, explanation: str, cards: Sequence[Comparison], *, film: bool = False) -> str:
    """A section whose pictures are small enough for hundreds of them."""
    return section_of(Section(title, explanation, cards, film=film, small=True))


def _grid(gallery: Gallery, group: Sequence[Sample], arms: Mapping[str, str]) -> Grid:
    shown = evenly(group, _SEEDS)
    rows = []
    for arm, title in arms.items():
        panels = [p for s in shown for p in gallery.made(s, arm, _score(gallery, s, arm))]
        # A picture that is missing would shift the others under a wrong seed.
        if len(panels) == len(shown):
            rows.append((title, panels))
    heads = [f"seed {sample['seed']}" for sample in shown]
    return Grid(str(group[0]["prompt"]), _gained(gallery, group), heads, rows)


def _gained(gallery: Gallery, group: Sequence[Sample]) -> str:
    lead = gallery.lead
    if lead is None or all(lead.change(sample) is None for sample in group):
        return ""
    return f"{lead.score.title} {lead.text(lead.mean_change(group), sign=True)}"


def _score(gallery: Gallery, sample: Sample, arm: str) -> str:
    value = gallery.lead.value(sample, arm) if gallery.lead else None
    return "" if gallery.lead is None or value is None else gallery.lead.text(value)


def _explained(gallery: Gallery) -> str:
    same = "Every model began with the same noise."
    return f"{same} Below each picture: its {gallery.lead.score.title}." if gallery.lead else same
