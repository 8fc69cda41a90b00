"""What the numbers say: a sentence, and whether to keep what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from eval.figures import number, signed
from eval.scores import Score

Keep = Literal["keep", "unclear", "leave"]

DISTANCES = ("fid", "kid", "cmmd")
LIKENESSES = ("dino", "clip_i")
LOST = 0.1  # share of the text score whose loss weighs more than what was won


def judge(scores: Mapping[str, Score], *, copies: bool) -> tuple[Keep, str]:
    """Whether to keep it, and why, in one sentence; a change whose interval holds 0 is unclear.

    copies: whether the results copy pictures trained on.
    """
    leading = next((name for name in scores if name in DISTANCES + LIKENESSES), None)
    text = next((name for name in ("clip_t", "clip_score") if name in scores), None)
    said = [_leading(scores[leading])] if leading else []
    if text:
        agrees = not leading or _agree(scores[leading], scores[text])
        said.append(_text(scores[text], agrees=agrees))
    sentence = ", ".join(said) or "There is nothing to compare"
    if copies:
        sentence = f"It copies pictures it was trained on. {sentence}"
    return _keep(scores.get(leading or ""), scores.get(text or ""), copies), sentence + "."


def _keep(leading: Score | None, text: Score | None, copies: bool) -> Keep:
    won = leading.improved if leading else (text.improved if text else 0)
    if copies or won < 0:
        return "leave"
    if won == 0 or (leading and text and _loss(text) > LOST):
        return "unclear"
    return "keep"


def _loss(text: Score) -> float:
    """Which share of the text score is surely gone, 0 to 1."""
    if text.change is None or text.improved >= 0:
        return 0.0
    before = text.values["finetuned"].value - text.change.value
    return -text.change.value / before if before > 0 else 0.0


def _leading(score: Score) -> str:
    if score.title in ("DINO", "CLIP-I"):
        moved = {
            1: "Fine-tuning made the pictures more like the subject",
            0: "Fine-tuning did not clearly make the pictures more like the subject",
            -1: "Fine-tuning made the pictures less like the subject",
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
        0: "they follow the prompts about as well as before",
        1: "they follow the prompts better",
    }[score.improved]
    return f"{'and' if agrees else 'but'} {follow} ({score.title} {_moved(score)})"


def _agree(leading: Score, text: Score) -> bool:
    return leading.improved == 0 or text.improved == 0 or leading.improved == text.improved


def _moved(score: Score) -> str:
    after = score.values["finetuned"].value
    if score.change is None:
        return number(after)
    before = after - score.change.value
    real = score.values.get("real")
    if real is not None and real.value > before:
        way = (after - before) / (real.value - before)
        return f"{number(before)} to {number(after)}, {way:.0%} of the way to real pictures"
    share = f", {signed(100 * score.change.value / before, '.1f')} %" if before > 0 else ""
    return f"{number(before)} to {number(after)}{share}"


def warnings(*, prompts: int, cut_prompts: int) -> list[str]:
    """What a reader of all the numbers must know, as sentences."""
    found = []
    if 0 < prompts < 10:
        found.append(f"There are only {prompts} different prompts: the intervals are rough.")
    if cut_prompts:
        found.append(f"{cut_prompts} prompts are longer than CLIP reads: their end is not scored.")
    return found
