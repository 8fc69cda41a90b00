"""Pictures as features, which the distances, likenesses and scores of an evaluation stand on.

An extractor is a CLIP, DINO or DINOv2 folder or hub id, or an Inception file. Each picture's
features depend on the picture and the extractor alone: see eval/networks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np

from data.examine import in_order, reason
from data.images import open_image
from eval import model_folder
from eval.resizing import Mode
from train import screens
from train.config import UserError

if TYPE_CHECKING:
    import torch

    from eval.clip_features import ClipExtractor
    from eval.feature_cache import Cache

Picture = np.ndarray | str | Path  # uint8 RGB (H, W, 3), or an image file
AT_ONCE = 128  # pictures embedded before they are put into the cache

Gather = Callable[[Any], list[Any]]


class Extractor(Protocol):
    """Pictures to features.

    `name`: where it was found; `fingerprint`: sha256 of its weights; `resize`: the convention, with
    its size in pixels; `dimension`: d; `cache_key`: all that features depend on but the picture.
    """

    name: str
    fingerprint: str
    resize: str
    dimension: int
    cache_key: str

    def describe(self) -> dict[str, Any]:
        """What must agree for two evaluations to be compared (sha256, resize, dimension), and the
        name."""
        ...

    def images(self, pictures: Iterable[Picture]) -> np.ndarray:
        """Features (N, d), float64."""
        ...


def load_extractor(
    path: str | Path, *, device: str | torch.device = "cpu", resize: Mode = "clean"
) -> Extractor:
    """The extractor at a local folder or file or of a hub id, by what is there. UserError where it
    cannot be one."""
    from eval.clip_features import ClipExtractor
    from eval.vision_features import VisionExtractor

    if resize not in get_args(Mode):
        raise UserError(f"resize={resize} is not known: give {' or '.join(get_args(Mode))}")
    found, name = find_extractor(path).resolve(), str(path)
    if found.is_file():
        from eval.inception_features import InceptionExtractor

        return InceptionExtractor(found, name=name, device=device, resize=resize)
    texts_too = model_folder.kind_of(found) in model_folder.TEXT_AND_PICTURES
    kind = ClipExtractor if texts_too else VisionExtractor
    return kind(found, name=name, device=device, resize=resize)


def load_clip(path: str | Path, *, device: str | torch.device = "cpu") -> ClipExtractor:
    """The CLIP in a local folder or of a hub id: it embeds texts too."""
    from eval.clip_features import ClipExtractor

    return ClipExtractor(find_clip(path).resolve(), name=str(path), device=device)


def find_extractor(path: str | Path) -> Path:
    """Its local folder, downloaded if a hub id, or its file; UserError for what cannot be an
    extractor, before anything of it is used."""
    if not Path(path).is_file():
        return model_folder.find_folder(path)
    from eval import inception_features

    if Path(path).suffix not in inception_features.SUFFIXES:
        raise UserError(
            f"{path} is no extractor: give an Inception file "
            f"({', '.join(inception_features.SUFFIXES)}), or the folder of a CLIP or DINO model"
        )
    inception_features.check(Path(path))
    return Path(path)


def find_clip(path: str | Path) -> Path:
    """As `find_extractor`, and UserError for what does not embed texts."""
    found = find_extractor(path)
    if found.is_file() or model_folder.kind_of(found) not in model_folder.TEXT_AND_PICTURES:
        raise UserError(
            f"{path} embeds pictures, but not texts: give the folder of a CLIP model or a hub id"
        )
    return found


def read_rgb(path: str | Path) -> np.ndarray:
    """An image file as upright sRGB, uint8 (H, W, 3), what is transparent over white. UserError
    where it cannot be read."""
    try:
        return np.asarray(open_image(Path(path)))
    except Exception as error:  # a damaged file can raise nearly anything in a decoder
        raise UserError(f"{path} {reason(error)}: mend it, make it again or take it out") from error


def pixels_of(picture: Picture) -> np.ndarray:
    """uint8 (H, W, 3)."""
    return picture if isinstance(picture, np.ndarray) else read_rgb(picture)


def alone(value: Any) -> list[Any]:
    """What all processes give, where there is one."""
    return [value]


def extract(
    extractor: Extractor,
    pictures: Sequence[Picture],
    *,
    cache: Path | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Gather = alone,
) -> np.ndarray:
    """Features (N, d), float64, on every process: process `rank` of `world` embeds its share of
    what the folder `cache` lacks, and `gather` gives each what all of them found, in order of rank.

    A picture that occurs twice is embedded once. The bits are the same on any number of processes.
    UserError for a picture that cannot be read, or that changes meanwhile.
    """
    from eval.feature_cache import open_cache, sign

    def shared(work: Callable[[Sequence[Any]], Iterable[Any]], items: Sequence[Any]) -> list[Any]:
        shares = gather(list(work(items[rank::world])))
        return [shares[k % world][k // world] for k in range(len(items))]

    signed = shared(lambda some: in_order(lambda k: sign(pictures[k]), some), range(len(pictures)))
    first = {sha256: k for k, sha256 in reversed(list(enumerate(signed)))}
    wanted = sorted(first, key=first.__getitem__)  # each once
    with open_cache(cache, extractor) as store:
        found = dict(zip(wanted, shared(store.get, wanted), strict=True))
        lacking = [sha256 for sha256 in wanted if found[sha256] is None]
        embed = partial(_embed, extractor, pictures, first, store)
        found.update(zip(lacking, shared(embed, lacking), strict=True))
    every = [found[sha256] for sha256 in signed]
    return np.array(every, np.float64).reshape(len(signed), extractor.dimension)


def _embed(
    extractor: Extractor,
    pictures: Sequence[Picture],
    places: Mapping[str, int],
    cache: Cache,
    wanted: Sequence[str],
) -> Iterator[np.ndarray]:
    """Rows (d,) of the pictures of these hashes, put into the cache as they come."""
    from eval.feature_cache import compact, sign

    bar = screens.bar(
        len(wanted), "features", unit="pictures", shown=screens.is_first() and len(wanted) > 0
    )
    for start in range(0, len(wanted), AT_ONCE):
        some = wanted[start : start + AT_ONCE]
        batch = list(in_order(lambda sha256: pictures[places[sha256]], some))
        rows = extractor.images(batch)
        for sha256, picture, now in zip(some, batch, in_order(sign, batch), strict=True):
            if sha256 != now:  # or the cache would hold another picture's features for good
                raise UserError(f"{_said(picture)} changed while it was measured: run this again")
        cache.put(some, rows)
        bar.update(len(some))
        yield from map(compact, rows)
    bar.close()


def _said(picture: Picture) -> str:
    return "a picture" if isinstance(picture, np.ndarray) else str(picture)
