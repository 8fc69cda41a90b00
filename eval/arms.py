"""Which pictures an evaluation makes: of what, with which seed and size, and by which model.

What is measured alike is an arm: `base` and `finetuned` get the same prompts and seeds, and so does
`base_class`, with the class's words in place of the subject's. `prior/...` are pictures of the
class, `general/...` of neither, `scale-0.5` of some prompts with half an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from data.buckets import assign
from data.images import Size

if TYPE_CHECKING:
    from data.records import Record
    from eval.protocols import Protocol

T = TypeVar("T")

SWEPT = 8  # prompts of a sweep over scales
PRIOR = 16  # pictures of the class at least


@dataclass(frozen=True)
class Task:
    """One picture to make, by several models alike."""

    prompt: str
    seed: int
    size: Size
    class_prompt: str | None = None
    """The same with the class's words; None without a subject."""
    described: str | None = None
    """What the picture should show in words that a CLIP knows; None: the prompt says it."""


@dataclass(frozen=True)
class Plan:
    """All pictures of an evaluation."""

    samples: list[Task]
    prior: list[Task]
    general: list[Task]
    scales: list[float]

    @property
    def swept(self) -> list[Task]:
        """What is made at each scale: the first picture of some prompts."""
        return spread(first_of_each(self.samples), SWEPT) if self.scales else []

    def sweep(self) -> dict[float, str]:
        """The arm of each scale."""
        return {scale: f"scale-{scale:g}" for scale in self.scales}

    def arms(self) -> dict[str, list[Task]]:
        """What the base makes and what the fine-tuned model makes, by the arm's name; the sweep
        aside."""
        classes = [replace(t, prompt=t.class_prompt) for t in self.samples if t.class_prompt]
        others = [replace(t, seed=t.seed + len(self.general)) for t in self.general]
        found = {
            "base": self.samples,
            "base_class": classes if len(classes) == len(self.samples) else [],
            "prior/base": self.prior,
            "general/base": self.general,
            "general/other_seed": others,
            "finetuned": self.samples,
            "prior/finetuned": self.prior,
            "general/finetuned": self.general,
        }
        return {arm: tasks for arm, tasks in found.items() if tasks}


def is_of_base(arm: str) -> bool:
    return not arm.endswith("finetuned") and not arm.startswith("scale-")


def of_captions(
    records: Sequence[Record], *, images: int, buckets: Sequence[Size], seed: int
) -> list[Task]:
    """One task per picture: records are spread evenly, or repeated where there are too few. Task k
    has seed + k and the size of its record's bucket."""
    stride = max(1.0, len(records) / images)
    chosen = [records[int(k * stride) % len(records)] for k in range(images)]
    return [
        Task(record.captions[0], seed + k, assign(record.width, record.height, buckets))
        for k, record in enumerate(chosen)
    ]


def of_protocol(protocol: Protocol, *, per_prompt: int, size: Size, seed: int) -> list[Task]:
    """`per_prompt` tasks of each prompt in turn; task k has seed + k."""
    each = [prompt for prompt in protocol.prompts for _ in range(per_prompt)]
    return [
        Task(prompt.text, seed + k, size, prompt.class_text, prompt.described)
        for k, prompt in enumerate(each)
    ]


def of_class(prompts: Sequence[str], *, size: Size, seed: int) -> list[Task]:
    """Pictures of the class: each prompt equally often, at least 16 in all."""
    rounds = -(-PRIOR // len(prompts)) if prompts else 0
    return plain([prompt for prompt in prompts for _ in range(rounds)], size=size, seed=seed)


def plain(prompts: Iterable[str], *, size: Size, seed: int) -> list[Task]:
    """One task of each; task k has seed + k."""
    return [Task(prompt, seed + k, size) for k, prompt in enumerate(prompts)]


def first_of_each(tasks: Sequence[Task]) -> list[Task]:
    """The first task of each prompt."""
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.prompt, task)
    return list(first.values())


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spaced."""
    count = min(most, len(items))
    return [items[k * len(items) // count] for k in range(count)]
