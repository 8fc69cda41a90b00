"""What the numbers say: a sentence, and whether to keep what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from eval.figures import number, signed
from eval.scores import Score

Keep = Literal["keep", "unclear", "leave"]
Copying = Literal["no", "maybe", "yes"]

DISTANCES = ("fid", "kid", "cmmd")
LIKENESSES = ("dino", "clip_i")
TEXTS = ("clip_t", "clip_score")
LOST = 0.1  # share of the text score whose loss weighs more than what was won
FORGOTTEN = 0.8  # of what another seed changes, from where a model has forgotten


def judge(
    scores: Mapping[str, Score], *, copies: Copying = "no", subject: str = "the subject"
) -> tuple[Keep, str]:
    """Whether to keep it, and why, in a sentence or two; what is not sure is called unclear.

    copies: whether the results copy pictures trained on. subject: what likeness is a likeness to.

    Keep it where the leading score surely became better and nothing was surely lost: no tenth of
    the text score, not the class, not everything else. Leave it where it copies, where the leading
    score became worse, or where nothing was won and the text score surely lost.
    """
    leading = _first(scores, DISTANCES + LIKENESSES)
    text = _first(scores, TEXTS)
    said = [_leading(leading, subject)] if leading else []
    if text:
        said.append(_text(text, agrees=leading is None or _agree(leading, text)))
    costs = _costs(scores, subject)
    sentence = ", ".join([*said, *costs]) or "There is nothing to compare"
    warned = {"yes": "It copies pictures it was trained on. ", "maybe": _LOOK, "no": ""}[copies]
    return _keep(leading, text, copies, lost=bool(costs)), f"{warned}{sentence}."


_LOOK = "It may copy pictures it was trained on: look at the nearest ones. "


def _first(scores: Mapping[str, Score], names: tuple[str, ...]) -> Score | None:
    return next((score for name, score in scores.items() if name in names), None)


def _keep(leading: Score | None, text: Score | None, copies: Copying, *, lost: bool) -> Keep:
    won = leading.improved if leading else (text.improved if text else 0)
    fallen = leading is not None and text is not None and _loss(text) > LOST
    if copies == "yes" or won < 0 or (won == 0 and fallen):
        return "leave"
    return "unclear" if won == 0 or fallen or lost or copies == "maybe" else "keep"


def _loss(text: Score) -> float:
    """Which share of the text score is surely gone, 0 to 1."""
    if text.change is None or text.improved >= 0:
        return 0.0
    before = text.values["finetuned"].value - text.change.value
    return -text.change.value / before if before > 0 else 0.0


def _costs(scores: Mapping[str, Score], subject: str) -> list[str]:
    """What was surely lost beside the text."""
    found = []
    if "prior_preservation" in scores and scores["prior_preservation"].improved < 0:
        found.append(f"but its class has become more like {subject}")
    if "forgetting" in scores:
        value = scores["forgetting"].values["finetuned"]
        if value.low is not None and value.low > FORGOTTEN:
            found.append(
                "but unrelated pictures changed about as much as another seed changes them"
            )
    return found


def _leading(score: Score, subject: str) -> str:
    if score.title in ("DINO", "CLIP-I"):
        moved = {
            1: f"Fine-tuning made the pictures more like {subject}",
            0: f"Fine-tuning did not clearly make the pictures more like {subject}",
            -1: f"Fine-tuning made the pictures less like {subject}",
        }[score.improved]
    else:
        moved = {
            1: "Fine-tuning brought the pictures closer to the held-out ones",
            0: "Fine-tuning did not clearly change how close the pictures are to the held-out ones",
            -1: "Fine-tuning took the pictures further from the held-out ones",
        }[score.improved]
    return f"{moved} ({score.title} {_moved(score)})"


def _text(score: Score, *, agrees: bool) -> str:
    follow = {
        -1: "they follow the prompts less well",
        0: "they follow the prompts about as well as before"
        if _is_small(score)
        else "whether they follow the prompts as well is not clear",
        1: "they follow the prompts better",
    }[score.improved]
    return f"{'and' if agrees else 'but'} {follow} ({score.title} {_moved(score)})"


def _is_small(score: Score) -> bool:
    """Whether the change is surely less than what would weigh."""
    if score.change is None:
        return False
    limit = LOST * abs(score.values["finetuned"].value - score.change.value)
    return -limit <= score.change.low and score.change.high <= limit


def _agree(leading: Score, text: Score) -> bool:
    return leading.improved == 0 or text.improved == 0 or leading.improved == text.improved


def _moved(score: Score) -> str:
    after = score.values["finetuned"].value
    if score.change is None:
        return f"{number(after)}, too few prompts to tell"
    before = after - score.change.value
    return f"{number(before)} to {number(after)}{_share(score, before, after)}"


def _share(score: Score, before: float, after: float) -> str:
    real = score.values.get("real")
    if real is not None:  # a ceiling says more than a percentage of a cosine
        if score.improved <= 0 or real.value <= before:
            return ""
        way = (after - before) / (real.value - before)
        return (
            ", as like as real pictures" if way > 0.99 else f", {way:.0%} of the way to real ones"
        )
    if min(before, after) <= 0:  # as unbiased distances can be
        return ""
    return f", {signed(100 * (after - before) / before, '.1f')} %"


def warnings(*, prompts: int, cut_prompts: int) -> list[str]:
    """What a reader of all the numbers must know, as sentences."""
    found = []
    if 0 < prompts < 10:
        there = "is only 1 prompt" if prompts == 1 else f"are only {prompts} different prompts"
        found.append(f"There {there}: the intervals are rough.")
    if cut_prompts:
        found.append(f"{cut_prompts} prompts are longer than CLIP reads: their end is not scored.")
    return found
