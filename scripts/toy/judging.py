"""How well a subject of the toy world was learned, and what the class lost by it.

Pictures are judged by the toy CLIP, which knows the subjects, and by the checker; neither shares
weights with the base or saw a generated picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import toy
from eval.clip_score import unit

if TYPE_CHECKING:
    from eval.clip_features import ClipExtractor
    from scripts.toy.checker import Checker

VIEW_SEED, OTHER_VIEW_SEED = 201, 202  # worlds that no run trains on


@dataclass
class Judge:
    """The toy CLIP and the checker, and real views of one subject.

    scenes: what is prompted for. real: similarity of real views among themselves; faceless: of the
    subject's body in its colour, but without its parts.
    """

    clip: ClipExtractor
    checker: Checker
    subject: str
    views: int

    def __post_init__(self) -> None:
        self.scenes = [toy.sample_scene(VIEW_SEED, k) for k in range(self.views)]
        self._held_out = self._embed([self._view(scene) for scene in self.scenes])
        again = [_again(scene, k) for k, scene in enumerate(self.scenes)]
        self.real = self.similarity([self._view(scene) for scene in again])
        figure = toy.SUBJECTS[self.subject]
        bare = [replace(scene, shape=figure.body, colour=figure.colour) for scene in again]
        self.faceless = self.similarity([toy.render(scene, 128, 128) for scene in bare])

    @classmethod
    def of(cls, subject: str, *, views: int) -> Judge:
        from eval.features import load_clip
        from scripts.toy.checker import load_checker

        clip = load_clip("data/assets/toy-clip")
        return cls(clip, load_checker(Path("data/assets/toy-checker")), subject, views)

    def similarity(self, pictures: Sequence[Any]) -> float:
        """Mean cosine of picture k and the held-out view of the same caption as its prompt (CLIP-I
        of Ruiz et al. 2022, section 4.2, with pairs alike in all but the subject)."""
        return float((self._embed(pictures) * self._held_out).sum(axis=1).mean())

    def unseen(self, seed: int, count: int) -> list[int]:
        """Which scenes combine a size and a background that the first `count` scenes of the world
        `seed` do not."""
        seen = {(s.size, s.background) for s in (toy.sample_scene(seed, k) for k in range(count))}
        return [k for k, s in enumerate(self.scenes) if (s.size, s.background) not in seen]

    def closed(self, similarity: float, base: float) -> float:
        """Share of the way from the base's similarity to that of real views among themselves."""
        return (similarity - base) / (self.real - base)

    def recombined(self, pictures: Sequence[Any], scenes: Sequence[toy.Scene]) -> dict[str, float]:
        """Share of pictures that show the subject, the right size, the right background, both of
        the latter as was asked, and all at once."""
        read = self._read(pictures)
        right = {
            "subject": np.array([name == self.subject for name in self._named(pictures, scenes)]),
            "size": np.array([r["size"] == s.size for r, s in zip(read, scenes, strict=True)]),
            "background": np.array(
                [r["background"] == s.background for r, s in zip(read, scenes, strict=True)]
            ),
        }
        right["asked"] = right["size"] & right["background"]
        right["all"] = right["asked"] & right["subject"]
        return {name: float(values.mean()) for name, values in right.items()}

    def class_kept(
        self, pictures: Sequence[Any], scenes: Sequence[toy.Scene], free: Sequence[Sequence[Any]]
    ) -> dict[str, float]:
        """Of the class's other members: how many pictures of full captions are right in all four
        attributes, and how different those of one prompt are that leaves the colour open (mean
        1 - cosine of pairs, as DIV of Ruiz et al. 2022, section 4.3), for several prompts."""
        read = self._read(pictures)
        right = [
            all(value == getattr(scene, name) for name, value in reading.items())
            for reading, scene in zip(read, scenes, strict=True)
        ]
        apart = [_apart(self._embed(group)) for group in free]
        return {"accuracy": float(np.mean(right)), "diversity": float(np.mean(apart))}

    def _view(self, scene: toy.Scene) -> np.ndarray:
        return toy.render(scene, 128, 128, subject=self.subject)

    def _embed(self, pictures: Sequence[Any]) -> np.ndarray:
        return unit(self.clip.images(pictures))  # (n, d)

    def _named(self, pictures: Sequence[Any], scenes: Sequence[toy.Scene]) -> list[str]:
        """Which real picture of that size and background the CLIP takes each for: one of a subject,
        or of its body without parts in one of the colours."""
        names = [*toy.SUBJECTS, *toy.COLOURS]
        named = []
        for row, scene in zip(self._embed(pictures), scenes, strict=True):
            real = self._embed([self._candidate(name, scene) for name in names])
            named.append(names[int((real @ row).argmax())])
        return named

    def _candidate(self, name: str, scene: toy.Scene) -> np.ndarray:
        middle = replace(scene, x=0.5, y=0.5, angle=0.0, tint=(0.0, 0.0, 0.0))
        if name in toy.SUBJECTS:
            return toy.render(middle, 128, 128, subject=name)
        plain = replace(middle, shape=toy.SUBJECTS[self.subject].body, colour=name)
        return toy.render(plain, 128, 128)

    def _read(self, pictures: Sequence[Any]) -> list[dict[str, str]]:
        return [
            reading
            for start in range(0, len(pictures), 64)
            for reading in self.checker.read(list(pictures[start : start + 64]))
        ]


def _apart(features: np.ndarray) -> float:
    """Mean 1 - cosine of all pairs of features (n, d)."""
    return float(1 - (features @ features.T)[np.triu_indices(len(features), k=1)].mean())


def _again(scene: toy.Scene, index: int) -> toy.Scene:
    """The scene as the same caption would be drawn another time."""
    rng = np.random.default_rng((OTHER_VIEW_SEED, index))
    shift, tint = rng.uniform(-0.01, 0.01, size=2), rng.uniform(-8, 8, size=3)
    return replace(
        scene,
        x=scene.x + float(shift[0]),
        y=scene.y + float(shift[1]),
        angle=float(rng.uniform(-12, 12)) * toy.FREEDOM,
        radius=float(rng.uniform(*toy.SIZES[scene.size])),
        tint=tuple(map(float, tint)),  # type: ignore[arg-type]
        phase=float(rng.uniform()),
    )
