"""Whether a model gives back the pictures it was trained on.

A picture is suspicious where it is near to one training picture and much nearer to that one than to
the others. The second is what tells a copy: a model that shows its subject at its most typical, or
a subject that always looks the same, is near to all training pictures alike. Such relative
distances find copies in Carlini et al. 2023 (arXiv:2301.13188). How near is too near is no
constant: it is read off from real pictures that the model did not see, as Meehan et al. 2020 do
(arXiv:2004.05675), or, without any, off the training pictures among themselves (eval/copying.py).

Features blind to place and pose (CLIP, DINO) call two real photos of a thing near copies, so the
pictures' own `layout` is to be judged beside them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.counter import generator
from eval import copying
from eval.copying import Nearest
from eval.subject import members, unit

ALPHA = 0.05  # false alarms, among sound models
GENERATED, HELD_OUT, TRAINING, ALONE = 4, 4, 3, 4  # pictures, at the least
SIDE = 16  # cells of a layout


@dataclass(frozen=True)
class Pair:
    """A generated picture and the training picture it is nearest to, by their indices."""

    sample: int
    training: int
    similarity: float
    suspicious: bool


@dataclass(frozen=True)
class Memorisation:
    """What was found in one space of features, or in the most suspicious of several."""

    space: str
    judged: bool
    """False where there are too few pictures to tell."""
    p: float
    """How often a sound model would look as suspicious, by simulation."""
    share: float
    """Of the generated pictures that are suspicious, with a 95 % interval over prompts."""
    low: float
    high: float
    expected: float
    """The share that a sound model would have."""
    threshold: float
    """Cosine that every suspicious picture exceeds."""
    finding: str
    """What was seen, as a sentence without its full stop."""
    has_views: bool = True
    """False where the training pictures had to stand in for held-out ones."""
    pairs: list[Pair] = field(default_factory=list)
    """Every generated picture with its nearest, suspicious ones first, then by similarity."""

    @property
    def flagged(self) -> bool:
        return self.judged and self.p <= ALPHA and self.share > 0

    @property
    def said(self) -> str:
        """The finding and what it means, as one sentence."""
        if not self.judged:
            return f"{self.finding}."
        if self.flagged:
            return f"{self.finding}: the model copies."
        sound = f"{round(self.expected * len(self.pairs))} would be of a model that does not copy"
        return f"{self.finding}; about {sound}: no sign of copying (p = {self.p:.2g})."


def memorisation(
    generated: np.ndarray,
    training: np.ndarray,
    *,
    held_out: np.ndarray | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    space: str = "features",
) -> Memorisation:
    """Judges generated (N, d) against training pictures (M, d), by features of any length.

    held_out: (K, d) real pictures of the same that were not trained on, best with the captions that
    are prompted for; without them, or with fewer than four, the training pictures stand in for
    them. groups: the prompt of each generated picture. Of several spaces take `most_suspicious`.
    """
    made, seen = unit(generated), unit(training)
    views = unit(held_out) if held_out is not None and len(held_out) >= HELD_OUT else None
    prompts = list(members(range(len(made)) if groups is None else groups).values())
    if few := _too_few(len(made), len(seen), views is not None):
        return _unjudged(few, space)
    found = Nearest.of(1 - made @ seen.T)
    null = _null(seen, views, seed)
    if len(null.depth) < HELD_OUT:
        return _unjudged("The training pictures are too much alike to tell copies by", space)
    real, scores = null.scores(null.centre), found.scores(null.centre)  # (n,), (N,)
    n = len(real)
    simulated = copying.sound_models(
        min(len(seen), copying.MOST), n if views is not None else 0, len(prompts), len(made), seed
    )
    rank = int(copying.shares(real, scores, prompts).argmax()) + 1
    limit = max(np.sort(real)[-rank], 0)
    suspicious = scores > limit
    low, high = copying.interval(suspicious, prompts)
    return Memorisation(
        space=space,
        judged=True,
        p=copying.p_value(copying.statistics(real, scores, prompts), simulated),
        share=float(suspicious.mean()),
        low=low,
        high=high,
        # Without held-out pictures the two that are each other's nearest count for one.
        expected=(rank if views is not None else min(rank + 1, n)) / (n + 1),
        threshold=float(1 - np.exp(-(limit + null.centre[0]))),
        finding=_finding(suspicious, found, null, rank, views is not None),
        has_views=views is not None,
        pairs=_pairs(found, suspicious),
    )


def most_suspicious(found: Iterable[Memorisation]) -> Memorisation:
    """Of several spaces the one with the least p, which is raised for having looked at them all
    (Bonferroni); without held-out pictures the one with the greatest, so that all must agree.

    A few training pictures, chosen to differ, do not tell how near a good answer to the prompt of
    one of them comes in features that see little else; a copy is near in every space. Raises
    ValueError for no space at all.
    """
    spaces = list(found)
    judged = [one for one in spaces if one.judged]
    if not spaces:
        raise ValueError("most_suspicious needs at least one space")
    if not judged:
        return spaces[0]
    if not all(one.has_views for one in judged):
        return max(judged, key=lambda one: (one.p, -one.share))
    worst = min(judged, key=lambda one: (one.p, -one.share))
    return replace(worst, p=min(1.0, worst.p * len(judged)))


def layout(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Where a picture is light, dark and coloured, (N, 768): uint8 RGB (H, W, 3) of any size,
    squashed to 16 x 16 cells of luminance and chroma.

    Each channel is centred on its mean, so that a cosine is a correlation of what is where, and a
    copy that is brighter, noisier or a pixel off is still the same.
    """
    rows = [_cells(picture) for picture in pictures]
    return np.stack(rows) if rows else np.empty((0, 3 * SIDE * SIDE))


def _cells(picture: np.ndarray) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(picture).convert("YCbCr")
    cells = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    return (cells - cells.mean((0, 1))).ravel()


def _null(training: np.ndarray, views: np.ndarray | None, seed: int) -> Nearest:
    """How near real pictures come to the training pictures."""
    rng = generator(seed, "real pictures")
    pool = training if views is None else views
    chosen = np.sort(rng.permutation(len(pool))[: copying.MOST])
    distances = 1 - pool[chosen] @ training.T
    return Nearest.among(distances) if views is None else Nearest.of(distances)


def _too_few(generated: int, training: int, held_out: bool) -> str | None:
    least = TRAINING if held_out else ALONE
    if training < least:
        more = "" if held_out else f", or {HELD_OUT} held-out ones beside {TRAINING}"
        return f"Too few training pictures to tell copies: {training}; it takes {least}{more}"
    if generated < GENERATED:
        return f"Too few pictures to tell copies: {generated}; generate at least {GENERATED}"
    return None


def _unjudged(why: str, space: str) -> Memorisation:
    return Memorisation(space, False, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, why)


def _finding(
    suspicious: np.ndarray, found: Nearest, null: Nearest, rank: int, held_out: bool
) -> str:
    count, n = int(suspicious.sum()), len(null.depth)
    of = f"of {n} held-out pictures" if held_out else f"of the {n} training pictures"
    than = f"any {of} is" if rank == 1 else f"all but {rank - 1} {of} are"
    than += "" if held_out else " to another"
    shown = found.depth[suspicious] if count else found.depth
    near, usual = (1 - np.exp(-np.median(depth)) for depth in (shown, null.depth))
    return (
        f"{count} of {len(suspicious)} pictures {'is' if count == 1 else 'are'} nearer to one "
        f"training picture than {than} (typically {near:.3f} against {usual:.3f})"
    )


def _pairs(found: Nearest, suspicious: np.ndarray) -> list[Pair]:
    similarity = 1 - np.exp(-found.depth)
    order = np.lexsort((-similarity, ~suspicious))
    return [
        Pair(int(k), int(found.index[k]), float(similarity[k]), bool(suspicious[k])) for k in order
    ]
