"""How each number of an evaluation came about, for a reader who wants to repeat or doubt it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.figures import number, signed
from eval.score_table import scores_of
from eval.scores import ARMS, Score

_EXTRACTORS = {
    "clip": "Text against pictures",
    "features": "Sets of pictures",
    "dino": "Subjects",
}


def how_computed(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A name and sentences for each score, then for what all of them stand on."""
    rows = [(score.title, _score(score)) for score in scores_of(metrics).values()]
    return [*rows, *_extractors(metrics), *_pictures(metrics), *_sets(metrics), *_weights(metrics)]


def _score(score: Score) -> str:
    said = [score.how, f"Interval: {score.interval}." if score.interval else "", _change(score)]
    facts = {k.replace("_", " "): _text(v) for k, v in score.facts.items() if k != "convention"}
    if facts:
        said.append(f"({'; '.join(f'{name}: {text}' for name, text in facts.items())})")
    return " ".join(text for text in said if text)


def _change(score: Score) -> str:
    if score.change is None:
        return ""
    p, effect = score.change.p, score.change.effect
    said = []
    if p is not None:
        said.append(f"p = {p:.2g} against no change" if p >= 0.0001 else "p < 0.0001")
    if effect is not None:
        said.append(f"effect size {signed(effect, '.2f')} standard deviations between prompts")
    return f"Change, paired: {', '.join(said)}." if said else ""


def _extractors(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for use, named in (metrics.get("extractors") or {}).items():
        if named:
            yield (
                _EXTRACTORS.get(use, use),
                f"by {named['name']}, {named['dimension']} dimensions, weights sha256 "
                f"{named['sha256']}; pictures resized by {named['resize']}.",
            )


def _pictures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    how, samples = metrics.get("settings") or {}, metrics.get("samples") or []
    said = []
    if "steps" in how:
        said.append(f"{how['steps']} steps, guidance {how['guidance']:g}")
    if scheduler := how.get("scheduler"):
        kind = scheduler.get("prediction_type", "epsilon")
        said.append(f"{scheduler['_class_name']} ({kind})")
    if "dtype" in how:
        said.append(f"{how['dtype']} on {how['device']}")
    said += [text for text in (_seeds(samples), _sizes(samples)) if text]
    if said:
        yield "Pictures", f"{'; '.join(said)}; rounded to 8 bits, PNG."
    rest = {name: how[name] for name in ("protocol", "subject", "noun", "result") if how.get(name)}
    if rest:
        yield "Evaluated", "; ".join(f"{name}: {value}" for name, value in rest.items()) + "."


def _sets(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, name in (("reference", "Held-out pictures"), ("training", "Training pictures")):
        if found := metrics.get(key):
            yield name, f"{found['pictures']:,}, sha256 of their hashes {found['sha256']}."


def _weights(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for model, prints in ((metrics.get("settings") or {}).get("weights") or {}).items():
        yield f"Weights, {ARMS.get(model, model)}", _text(prints)


def _seeds(samples: Sequence[Mapping[str, Any]]) -> str:
    seeds = [sample["seed"] for sample in samples if sample.get("seed") is not None]
    return f"seeds {min(seeds)} to {max(seeds)}" if seeds else ""


def _sizes(samples: Sequence[Mapping[str, Any]]) -> str:
    sizes = sorted({tuple(sample["size"]) for sample in samples if sample.get("size")})
    return "sizes " + ", ".join(f"{w}x{h}" for w, h in sizes) if sizes else ""


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return number(value) if isinstance(value, float) else str(value)
