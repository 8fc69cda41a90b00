"""The main table of an evaluation, for the report and for the terminal.

A row for each metric; base and baselines beside the fine-tuned model, and the change with the word
for it: better, worse or unclear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from eval.scores import ARMS, Change, Score, Value

CHANGE = "change"
MEANING = {
    "fid": "distance to the held-out pictures",
    "fid_infinity": "the same, as of endless pictures",
    "kid": "distance to the held-out pictures",
    "cmmd": "distance to the held-out pictures",
    "cmmd_biased": "the same, with the bias of published ones",
    "precision": "share that could be real",
    "recall": "share of the real variety",
    "density": "how densely around real ones",
    "coverage": "share of the real ones matched",
    "vendi": "how many unlike pictures",
    "inception_score": "clear and varied content",
    "clip_score": "how well pictures fit the prompt",
    "clip_t": "how well pictures fit the prompt",
    "clip_i": "likeness to the subject",
    "dino": "likeness to the subject, in detail",
    "diversity": "variety of one prompt's pictures",
    "prior_preservation": "likeness of the plain class",
    "forgetting": "change of unrelated pictures: 0 none, 1 another seed",
    "copies": "share that copies training pictures",
}
_ABOUT = {
    "base_class": "prompted with the class instead of the subject",
    "real": "real ones measured against real ones, the most to hope for",
    "training": "what a model that only copies its training pictures would score",
}
_SHOWN = ("base", "base_class", "finetuned", CHANGE)  # in the terminal
_WORDS = {1: ("better", "good"), -1: ("worse", "poor"), 0: ("unclear", "")}


def scores_of(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """The scores of a metrics.json by their key, the most telling first."""
    return {key: Score.of(content) for key, content in metrics.get("scores", {}).items()}


def columns(metrics: Mapping[str, Any], scores: Mapping[str, Score]) -> list[str]:
    """The arms that some score has, and the change after the fine-tuned model."""
    named = metrics.get("arms", {})
    arms = [arm for arm in named if any(arm in score.values for score in scores.values())]
    if any(score.change for score in scores.values()):
        after = max((arms.index(arm) for arm in ("base", "finetuned") if arm in arms), default=-1)
        arms.insert(after + 1, CHANGE)
    return arms


def heads(metrics: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    """What stands above the columns."""
    named = {CHANGE: CHANGE, **ARMS, **metrics.get("arms", {})}
    return [str(named[arm]) for arm in arms]


def decimals(score: Score) -> int:
    """So many that the largest value of a row has about three digits."""
    most = max((abs(value.value) for value in score.values.values()), default=0.0)
    steps = ((1000, 0), (100, 1), (1, 2), (0.1, 3), (0.01, 4), (0.001, 5))
    return next((digits for least, digits in steps if most >= least), 6 if most else 2)


def figure(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with a true minus, and with a plus where `sign`."""
    text = f"{abs(value):.{digits}f}"
    # A value that rounds to nothing has no side.
    minus, plus = ("", "") if not float(text) else ("\u2212", "+" if sign else "")
    return (minus if value < 0 else plus) + text


def interval(value: Value | Change, digits: int, *, sign: bool = False) -> str:
    """From where to where, empty where that is not known."""
    if value.low is None or value.high is None:
        return ""
    low, high = (figure(end, digits, sign=sign) for end in (value.low, value.high))
    return f"{low} to {high}" if sign or value.low < 0 else f"{low}\u2013{high}"


def judged(score: Score) -> tuple[str, str]:
    """The word for a change and its colour; empty where there is no change to judge."""
    if score.change is None or score.better is None:
        return "", ""
    return _WORDS[score.improved]


def main_table(metrics: Mapping[str, Any]) -> str:
    """The table as HTML, in a box that scrolls; nothing where there are no scores."""
    scores = scores_of(metrics)
    arms = columns(metrics, scores)
    if not arms:
        return ""
    head = "".join(
        f'<th scope="col"{_own(arm)}>{escape(name)}</th>'
        for arm, name in zip(arms, heads(metrics, arms), strict=True)
    )
    rows = "".join(_row(key, score, arms) for key, score in scores.items())
    return (
        f'<div class="wide" tabindex="0"><table class="scores"><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def legend(metrics: Mapping[str, Any]) -> str:
    """How to read the table, as one paragraph of HTML."""
    scores = scores_of(metrics)
    arms = columns(metrics, scores)
    said = ["Small print: 95 % interval."] if any(_has_interval(s) for s in scores.values()) else []
    if CHANGE in arms:
        said.append(
            f"Change, on the same prompts and seeds: fine-tuned minus "
            f"{_subtracted(metrics, scores)}. Unclear: its interval holds 0, or there are too few "
            "prompts to tell."
        )
    said += [
        f"{name[:1].upper()}{name[1:]}: {_ABOUT[arm]}."
        for arm, name in zip(arms, heads(metrics, arms), strict=True)
        if arm in _ABOUT
    ]
    return f'<p class="legend">{escape(" ".join(said))}</p>' if said else ""


def console(metrics: Mapping[str, Any]) -> str:
    """The table in aligned columns of text, a warning on the line below its metric."""
    scores = scores_of(metrics)
    shown = [arm for arm in columns(metrics, scores) if arm in _SHOWN]
    shown = shown or columns(metrics, scores)
    lines = [["", *heads(metrics, shown)]]
    lines += [[_named(score), *_texts(score, shown)] for score in scores.values()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    warned = ["", *(score.warning for score in scores.values())]
    return "\n".join(
        line + (f"\n  ! {warning}" if warning else "")
        for line, warning in zip(texts, warned, strict=True)
    )


def _subtracted(metrics: Mapping[str, Any], scores: Mapping[str, Score]) -> str:
    """What the changes are measured from, with the scores that are an exception."""
    by_arm: dict[str, list[str]] = {}
    for score in scores.values():
        if score.change:
            by_arm.setdefault(score.against, []).append(score.title)
    usual, *others = sorted(by_arm, key=lambda arm: -len(by_arm[arm]))
    quoted = [f"\u201c{head}\u201d" for head in heads(metrics, list(by_arm))]
    names = dict(zip(by_arm, quoted, strict=True))
    rest = [f"; for {', '.join(by_arm[arm])} minus {names[arm]}" for arm in others]
    return names[usual] + "".join(rest)


def _texts(score: Score, arms: Sequence[str]) -> Iterator[str]:
    digits, word = decimals(score), judged(score)[0]
    for arm in arms:
        if arm != CHANGE:
            value = score.values.get(arm)
            spread = f"  [{interval(value, digits)}]" if value and CHANGE not in arms else ""
            yield figure(value.value, digits) + spread.replace("  []", "") if value else ""
        elif score.change:
            spread = interval(score.change, digits, sign=True)
            yield f"{figure(score.change.value, digits, sign=True)}  [{spread}]  {word}".rstrip()
        else:
            yield ""


def _named(score: Score) -> str:
    return f"{score.title} ({score.better} is better)" if score.better else score.title


def _row(key: str, score: Score, arms: Sequence[str]) -> str:
    way = f" <i>{score.better} is better</i>" if score.better else ""
    cells = "".join(_cell(score, arm) for arm in arms)
    small = _small(escape(MEANING.get(key, "")))
    row = f'<th scope="row">{escape(score.title)}{way}{small}</th>{cells}'
    if not score.warning:
        return f"<tr>{row}</tr>"
    return (
        f'<tr class="told">{row}</tr><tr class="note"><td colspan="{len(arms) + 1}">'
        f"<p>{escape(score.warning)}</p></td></tr>"
    )


def _cell(score: Score, arm: str) -> str:
    digits = decimals(score)
    if arm == CHANGE and score.change:
        word, colour = judged(score)
        said = f'<span class="say {colour}">{word}</span>' if word else ""
        text = figure(score.change.value, digits, sign=True)
        spread = _small(interval(score.change, digits, sign=True))
        return f'<td class="moved"><b>{text}</b>{said}{spread}</td>'
    value = score.values.get(arm)
    if value is None:
        return f"<td{_own(arm)}></td>"
    text = figure(value.value, digits)
    return f"<td{_own(arm)}><b>{text}</b>{_small(interval(value, digits))}</td>"


def _small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""


def _own(arm: str) -> str:
    return ' class="own"' if arm == "finetuned" else ""


def _has_interval(score: Score) -> bool:
    return any(value.low is not None for value in score.values.values())
