"""The embeddings of everything that an evaluation looks at, each picture and text once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.images import Size
from eval.arms import Plan, Task
from train.config import EvaluationConfig

if TYPE_CHECKING:
    from data.records import Record
    from eval.clip_features import ClipExtractor
    from eval.features import Extractor
    from eval.inputs import Given

Made = Mapping[str, Sequence[Path]]
"""The pictures of each arm."""


@dataclass(frozen=True)
class Extractors:
    """What looks at the pictures: a CLIP, what the distances stand on, and a DINO if there is
    one."""

    clip: ClipExtractor
    features: Extractor
    dino: Extractor | None = None

    @classmethod
    def load(cls, settings: EvaluationConfig, device: Any) -> Extractors:
        """As an evaluation section names them."""
        from eval.features import load_clip, load_extractor

        clip = load_clip(settings.clip, device=device)
        alike = settings.features in (None, settings.clip) and settings.resize == "clean"
        return cls(
            clip,
            clip
            if alike
            else load_extractor(
                settings.features or settings.clip, device=device, resize=settings.resize
            ),
            load_extractor(settings.dino, device=device) if settings.dino else None,
        )

    def by_name(self) -> dict[str, Extractor]:
        found = {"clip": self.clip, "features": self.features, "dino": self.dino}
        return {name: each for name, each in found.items() if each is not None}

    def describe(self) -> dict[str, Any]:
        return {name: each.describe() for name, each in self.by_name().items()}


class Fitted(Sequence[np.ndarray]):
    """Real pictures as training would see them, read as they are looked at: uint8 (H, W, 3) of each
    one's bucket."""

    def __init__(self, records: Sequence[Record], buckets: Sequence[Size]) -> None:
        self._records, self._buckets = records, buckets

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Fitted(self._records[index], self._buckets)
        return fitted(self._records[index], self._buckets)


def fitted(record: Record, buckets: Sequence[Size]) -> np.ndarray:
    """A real picture as training would see it: uint8 (H, W, 3) of its bucket's size."""
    import io

    from data.buckets import assign
    from data.images import fit, open_image

    size = assign(record.width, record.height, buckets)
    return fit(open_image(io.BytesIO(record.read()), cover=size), size)


@dataclass(frozen=True)
class Embedded:
    """Embeddings (N, d) by extractor and by what they are of: an arm, `held_out` or `training`."""

    pictures: Mapping[str, Mapping[str, np.ndarray]]
    texts: Mapping[str, np.ndarray]
    """Of every prompt, by its text (d,)."""
    cut: int
    """How many prompts are longer than the CLIP reads."""
    classes: Mapping[str, np.ndarray] | None = None
    """Class probabilities by arm, where the features are Inception's."""

    def of(self, extractor: str, arms: Sequence[str]) -> dict[str, np.ndarray]:
        found = self.pictures[extractor]
        return {arm: found[arm] for arm in arms if arm in found}

    def real(self, extractor: str, which: str) -> np.ndarray:
        """(0, d) where there are none."""
        found = self.pictures[extractor]
        return found.get(which, np.empty((0, found["finetuned"].shape[1])))


def embed(
    plan: Plan,
    made: Made,
    given: Given,
    extractors: Extractors,
    *,
    extract: Callable[[Extractor, Sequence[Any]], np.ndarray],
) -> Embedded:
    """Embeds every picture and prompt. A place where all processes meet, in `extract`."""
    everything: dict[str, Sequence[Any]] = dict(made)
    everything |= {"held_out": Fitted(given.held_out, given.buckets)} if given.held_out else {}
    everything |= {"training": Fitted(given.training, given.buckets)} if given.training else {}
    named, done = extractors.by_name(), dict[int, dict[str, np.ndarray]]()
    for each in named.values():
        if id(each) not in done:
            done[id(each)] = {name: extract(each, found) for name, found in everything.items()}
    texts = sorted({text for task in plan.samples for text in _texts(task)})
    return Embedded(
        pictures={name: done[id(each)] for name, each in named.items()},
        texts=dict(zip(texts, extractors.clip.texts(texts), strict=True)),
        cut=extractors.clip.count_cut(sorted({task.prompt for task in plan.samples})),
        classes=_classes(extractors.features, done[id(extractors.features)]),
    )


def _texts(task: Task) -> list[str]:
    return [text for text in (task.prompt, task.class_prompt, task.described) if text]


def _classes(features: Extractor, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """From the features of each arm, where they are Inception's."""
    probabilities = getattr(features, "classes", None)
    if probabilities is None:
        return None
    return {arm: probabilities(found[arm]) for arm in ("base", "finetuned") if arm in found}
