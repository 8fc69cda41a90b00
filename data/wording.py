"""What becomes of a caption each time its picture is seen: a function of (seed, epoch, picture)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from data import counter
from train.config import CaptionConfig, UserError

# The templates of textual inversion (Gal et al. 2022, arXiv:2208.01618), those that occur twice
# there included.
OBJECT = tuple(
    f"{words} {{}}"
    for words in (
        "a photo of a",
        "a rendering of a",
        "a cropped photo of the",
        "the photo of a",
        "a photo of a clean",
        "a photo of a dirty",
        "a dark photo of the",
        "a photo of my",
        "a photo of the cool",
        "a close-up photo of a",
        "a bright photo of the",
        "a cropped photo of a",
        "a photo of the",
        "a good photo of the",
        "a photo of one",
        "a close-up photo of the",
        "a rendition of the",
        "a photo of the clean",
        "a rendition of a",
        "a photo of a nice",
        "a good photo of a",
        "a photo of the nice",
        "a photo of the small",
        "a photo of the weird",
        "a photo of the large",
        "a photo of a cool",
        "a photo of a small",
    )
)
STYLE = tuple(
    f"{words} in the style of {{}}"
    for words in (
        "a painting",
        "a rendering",
        "a cropped painting",
        "the painting",
        "a clean painting",
        "a dirty painting",
        "a dark painting",
        "a picture",
        "a cool painting",
        "a close-up painting",
        "a bright painting",
        "a cropped painting",
        "a good painting",
        "a close-up painting",
        "a rendition",
        "a nice painting",
        "a small painting",
        "a weird painting",
        "a large painting",
    )
)
TEMPLATES = {"object": OBJECT, "style": STYLE}

# Braces with no braces within; one with a backslash before it is a letter like any other.
INNERMOST = re.compile(r"(?<!\\)\{((?:[^{}]|(?<=\\)[{}])*)(?<!\\)\}")
BAR = re.compile(r"(?<!\\)\|")
ESCAPED = re.compile(r"\\([{}|])")
RUNS_PER_VARIANT = 64  # ways to one and the same caption that `variants` follows before it gives up


@dataclass(frozen=True)
class Wording:
    """How captions are put into words; the fields are as in CaptionConfig.

    In this order: one of several captions is chosen, or `replace` where it is given, wildcards are
    replaced, tags are dropped and shuffled, the trigger is put in front where it is lacking, a
    template is filled, prefix and suffix are added, and white space becomes single spaces.

    - Wildcards nest; choices may be empty. Braces without a partner stay as they are, and so do,
      without their backslash, \\{ and \\| and \\}.
    - A caption is taken apart at `separator` only if tags are shuffled or dropped. Every tag but
      the first `keep_tags` may be dropped, so that nothing may be left.
    - The trigger comes after the tags: it is never dropped, and in front where it is added. A
      caption that holds it as whole words, in whatever case, is left as it is.

    Raises UserError for a template without {} and for an empty separator.
    """

    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    choose: str = "random"
    replace: str = ""
    separator: str = ","
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_dropout: float = 0.0
    wildcards: bool = False
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in self.templates:
            if "{}" not in template:
                raise UserError(
                    f"data.captions.templates: {template!r} has no {{}}; write {{}} where the "
                    'caption goes, as in "a photo of a {}"'
                )
        if not self.separator:
            raise UserError('data.captions.separator is empty; it is usually ","')

    @classmethod
    def of(cls, config: CaptionConfig) -> Wording:
        """From the configuration, named templates looked up."""
        values = config.model_dump(exclude={"templates", "max_tokens"})
        named = config.templates
        return cls(**values, templates=TEMPLATES[named] if isinstance(named, str) else tuple(named))

    def caption(
        self, captions: Sequence[str], *, seed: int, epoch: int, id: str, repeat: int = 0
    ) -> str:
        """The caption of picture `id`, which has these captions, at its `repeat`-th time in
        `epoch`."""
        return self._worded(captions, _Drawn(seed, "wording", epoch, id, repeat))

    def variants(self, captions: Sequence[str], limit: int = 32) -> list[str] | None:
        """All that `caption` can return for these captions, sorted, if it is at most `limit`.

        None where it is more, or where the same captions come about in so many ways that to go
        through them would take long.
        """
        found: set[str] = set()
        answers: list[int] = []
        for _ in range(limit * RUNS_PER_VARIANT):
            listed = _Listed(answers)
            found.add(self._worded(captions, listed))
            if len(found) > limit:
                return None
            following = listed.following()
            if following is None:
                return sorted(found)
            answers = following
        return None

    @property
    def _tagged(self) -> bool:
        return self.shuffle_tags or self.tag_dropout > 0

    def _worded(self, captions: Sequence[str], draw: _Draw) -> str:
        captions = (self.replace,) if self.replace else captions
        text = _one(captions[:1] if self.choose == "first" else captions, draw)
        if self.wildcards:
            text = _expand(text, draw)
        if self._tagged:
            text = self._rearranged(text, draw)
        text = self._triggered(" ".join(text.split()))
        if self.templates:
            text = _one(self.templates, draw).replace("{}", text)
        return " ".join(f"{self.prefix}{text}{self.suffix}".split())

    def _rearranged(self, text: str, draw: _Draw) -> str:
        # A separator with white space around it (" | ") parts tags that lack it, too.
        parts = text.split(self.separator.strip() or self.separator)
        tags = [tag for part in parts if (tag := " ".join(part.split()))]
        kept, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        if self.tag_dropout:
            rest = [tag for tag in rest if not draw.chance(self.tag_dropout)]
        if self.shuffle_tags:
            for last in range(len(rest) - 1, 0, -1):  # Fisher and Yates
                other = draw.below(last + 1)
                rest[last], rest[other] = rest[other], rest[last]
        return self._joint.join(kept + rest)

    @property
    def _joint(self) -> str:
        spaced = self.separator != "".join(self.separator.split())
        return self.separator if spaced else f"{self.separator} "

    def _triggered(self, text: str) -> str:
        trigger = " ".join(self.trigger.split())
        if not trigger or whole_words(trigger).search(text):
            return text
        return f"{trigger}{self._joint}{text}" if text else trigger


def whole_words(words: str) -> re.Pattern[str]:
    """What finds the words, and not as part of others, in whatever case."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)


def _one(texts: Sequence[str], draw: _Draw) -> str:
    return texts[draw.below(len(texts))] if len(texts) > 1 else texts[0]


def _expand(text: str, draw: _Draw) -> str:
    """The text with each {a|b} replaced by a choice, innermost first."""
    found = 1
    while found:
        text, found = INNERMOST.subn(lambda match: _one(BAR.split(match[1]), draw), text)
    return ESCAPED.sub(r"\1", text)


class _Draw(Protocol):
    """Where the choices of one caption come from."""

    def below(self, high: int) -> int:
        """A whole number from 0 to high - 1."""

    def chance(self, probability: float) -> bool:
        """True with this probability."""


class _Drawn:
    """Random choices, from a generator made at the first of them: most captions need none."""

    def __init__(self, seed: int, *purpose: str | int) -> None:
        self._seed, self._purpose = seed, purpose

    @cached_property
    def _generator(self) -> np.random.Generator:
        return counter.generator(self._seed, *self._purpose)

    def below(self, high: int) -> int:
        return int(self._generator.integers(high))

    def chance(self, probability: float) -> bool:
        return bool(self._generator.random() < probability)


class _Listed:
    """The choices `answers`, then 0 each time: how all that is possible is gone through in turn."""

    def __init__(self, answers: list[int]) -> None:
        self._answers = answers
        self._highs: list[int] = []

    def below(self, high: int) -> int:
        position = len(self._highs)
        self._highs.append(high)
        return self._answers[position] if position < len(self._answers) else 0

    def chance(self, probability: float) -> bool:
        return bool(self.below(2))

    def following(self) -> list[int] | None:
        """The answers of the next run, the last choice that can be raised raised; None after the
        last run."""
        answers = self._answers + [0] * (len(self._highs) - len(self._answers))
        for position in range(len(answers) - 1, -1, -1):
            if answers[position] + 1 < self._highs[position]:
                return [*answers[:position], answers[position] + 1]
        return None
