"""Whether a model gives back the pictures it was trained on.

A picture is suspicious where it is near to one training picture and much nearer to that one than to
the others. The second is what tells a copy: a model that shows its subject at its most typical, or
a subject that always looks the same, is near to all training pictures alike. Such relative
distances find copies in Carlini et al. 2023 (arXiv:2301.13188). How near is too near is no
constant: it is read off from real pictures that the model did not see, as Meehan et al. 2020 do
(arXiv:2004.05675), or, without any, off the training pictures among themselves (eval/copying.py).
Held-out pictures of another kind (another session, another style) are further away whatever the
model does, so they are no measure either, and prompts of another kind than the captions of real
pictures have none: there only the pairs are shown.

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
DOUBT = 0.2  # p below which the pairs are worth a look
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
    prompted: bool = True
    """False where the prompts are not those of real pictures: then nothing is flagged."""
    note: str = ""
    """What must be known beside the number, as a sentence."""
    pairs: list[Pair] = field(default_factory=list)
    """Every generated picture with its nearest, suspicious ones first, then by similarity."""

    @property
    def flagged(self) -> bool:
        return self.prompted and self.judged and self.p <= ALPHA and self.share > 0

    @property
    def doubtful(self) -> bool:
        """Not flagged, but to be looked at."""
        return self.judged and not self.flagged and self.p <= DOUBT

    @property
    def said(self) -> str:
        """The finding and what it means, as one sentence, and the note."""
        return f"{self.finding}{self._meaning}. {self.note}".rstrip()

    @property
    def _meaning(self) -> str:
        if not self.judged:
            return ""
        if not self.prompted:
            unknown = "the prompts are not those of real pictures, so no threshold is known"
            return f"; look at the pairs: {unknown}"
        if self.flagged:
            return ": the model copies"
        count = round(self.expected * len(self.pairs))
        more = "a few more" if sum(pair.suspicious for pair in self.pairs) > count else "nearer"
        seen = f"{more} than expected: look at the pairs" if self.doubtful else "no sign of copying"
        would = f"; about {count} would be of a model that does not copy: "
        return f"{would}{seen} (p = {self.p:.2g})"


def memorisation(
    generated: np.ndarray,
    training: np.ndarray,
    *,
    held_out: np.ndarray | None = None,
    groups: Sequence[Hashable] | None = None,
    prompted: bool = True,
    twins: np.ndarray | None = None,
    seed: int = 0,
    space: str = "features",
) -> Memorisation:
    """Judges generated (N, d) against training pictures (M, d), by features of any length.

    held_out: (K, d) real pictures of the same that were not trained on, best with the captions that
    are prompted for; without them, with fewer than four or where they are of another kind, the
    training pictures stand in for them. groups: the prompt of each generated picture; prompted:
    whether it is the caption of a real picture. twins: (M, d) the training pictures mirrored, where
    they were trained on as well. Of several spaces take `most_suspicious`.
    """
    made, faces = unit(generated), _faces(training, twins)
    real = unit(held_out) if held_out is not None and len(held_out) >= HELD_OUT else None
    note = _another_kind(faces[0], real, seed)
    if note:
        real = None
    prompts = list(members(range(len(made)) if groups is None else groups).values())
    if few := _too_few(len(made), len(training), real is not None):
        return _unjudged(few, space, note)
    null = _null(faces, real, seed)
    if len(null.depth) < HELD_OUT:
        few = "The training pictures are too much alike to tell copies by"
        return _unjudged(few, space, note)
    seen, views = min(len(training), copying.MOST), 0 if real is None else len(null.depth)
    simulated = copying.sound_models(seen, views, len(prompts), len(made), seed)
    found = _judged(Nearest.of(_distances(made, faces)), null, prompts, simulated, views > 0)
    return replace(found, space=space, prompted=prompted, note=note)


def _judged(
    found: Nearest, null: Nearest, prompts: copying.Prompts, simulated: np.ndarray, has_views: bool
) -> Memorisation:
    real, scores = null.scores(null.centre), found.scores(null.centre)  # (n,), (N,)
    n = len(real)
    rank = int(copying.shares(real, scores, prompts).argmax()) + 1
    limit = max(np.sort(real)[-rank], 0)
    suspicious = scores > limit
    low, high = copying.interval(suspicious, prompts)
    return Memorisation(
        space="",
        judged=True,
        p=copying.p_value(copying.statistics(real, scores, prompts), simulated),
        share=float(suspicious.mean()),
        low=low,
        high=high,
        # Without held-out pictures the two that are each other's nearest count for one.
        expected=(rank if has_views else min(rank + 1, n)) / (n + 1),
        threshold=float(1 - np.exp(-(limit + null.centre[0]))),
        finding=_finding(suspicious, found, null, rank, has_views),
        has_views=has_views,
        pairs=_pairs(found, suspicious),
    )


def most_suspicious(found: Iterable[Memorisation]) -> Memorisation:
    """Of several spaces the one with the least p, which becomes that of all of them jointly
    (`copying.joint`); where the training pictures had to stand in, the one with the greatest, so
    that all must agree.

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
    return replace(worst, p=copying.joint([one.p for one in judged]))


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


def _faces(training: np.ndarray, twins: np.ndarray | None) -> np.ndarray:
    """(1 or 2, M, d): the training pictures and, if they were mirrored, their twins."""
    return np.stack([unit(rows) for rows in (training, twins) if rows is not None])


def _distances(pictures: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(N, M): 1 - cosine of unit rows (N, d) to the nearer face of each training picture."""
    return 1 - (pictures @ np.swapaxes(faces, 1, 2)).max(0)


def _another_kind(training: np.ndarray, views: np.ndarray | None, seed: int) -> str:
    """A note, where there are held-out pictures and they are no measure."""
    if views is None or len(training) < TRAINING:
        return ""
    p = copying.of_another_kind(training, views, seed)
    if p > copying.KIND:
        return ""
    return (
        f"The {len(views)} held-out pictures seem to be of another kind: further from those "
        f"trained on than these are from each other (p = {p:.2g}), so they are not the measure."
    )


def _null(faces: np.ndarray, views: np.ndarray | None, seed: int) -> Nearest:
    """How near real pictures come to the training pictures."""
    rng = generator(seed, "real pictures")
    chosen = copying.some(faces[0] if views is None else views, rng)
    distances = _distances(chosen, faces)
    return Nearest.among(distances) if views is None else Nearest.of(distances)


def _too_few(generated: int, training: int, held_out: bool) -> str | None:
    least = TRAINING if held_out else ALONE
    if training < least:
        more = "" if held_out else f", or {HELD_OUT} held-out ones beside {TRAINING}"
        return f"Too few training pictures to tell copies: {training}; it takes {least}{more}"
    if generated < GENERATED:
        return f"Too few pictures to tell copies: {generated}; generate at least {GENERATED}"
    return None


def _unjudged(why: str, space: str, note: str) -> Memorisation:
    return Memorisation(space, False, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, why, note=note)


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
