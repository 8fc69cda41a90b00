"""Features on disk: by the hash of the picture and all that the extractor's features depend on.

Kept in a TensorStore: an entry is there whole or not at all, and one that is damaged is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from data.store import TensorStore, Writer
from eval.features import Extractor, Picture
from train.config import UserError

NAME = "features"  # of the tensor in an entry


class Cache(Protocol):
    """Rows (d,) by the hash of their picture."""

    def get(self, sha256s: Sequence[str]) -> list[np.ndarray | None]: ...

    def put(self, sha256s: Sequence[str], rows: np.ndarray) -> None: ...


class NoCache:
    """Knows nothing and keeps nothing."""

    def get(self, sha256s: Sequence[str]) -> list[np.ndarray | None]:
        return [None] * len(sha256s)

    def put(self, sha256s: Sequence[str], rows: np.ndarray) -> None:
        pass


class FeatureCache:
    """What one extractor found, in a folder that others may use too."""

    def __init__(self, store: TensorStore, writer: Writer, extractor: Extractor) -> None:
        self._store, self._writer, self._extractor = store, writer, extractor

    def get(self, sha256s: Sequence[str]) -> list[np.ndarray | None]:
        return [self._row(sha256) for sha256 in sha256s]

    def put(self, sha256s: Sequence[str], rows: np.ndarray) -> None:
        import torch

        for sha256, row in zip(sha256s, rows, strict=True):
            self._writer.put(self._key(sha256), {NAME: torch.from_numpy(compact(row))})

    def _row(self, sha256: str) -> np.ndarray | None:
        tensors = self._store.get(self._key(sha256), [NAME]) or {}
        row = tensors[NAME].numpy() if NAME in tensors else None
        return row if row is not None and row.shape == (self._extractor.dimension,) else None

    def _key(self, sha256: str) -> str:
        return hashlib.sha256(f"{self._extractor.cache_key} {sha256}".encode()).hexdigest()


@contextmanager
def open_cache(folder: Path | None, extractor: Extractor) -> Iterator[Cache]:
    """The folder's cache of this extractor, written to the end when left. UserError where it cannot
    be written."""
    if folder is None:
        yield NoCache()
    else:
        store = TensorStore(folder)
        with store.writer() as writer:
            yield FeatureCache(store, writer, extractor)


def sign(picture: Picture) -> str:
    """The sha256 of a file's bytes, or of an array's shape and bytes. UserError where the file
    cannot be read."""
    if isinstance(picture, np.ndarray):
        digest = hashlib.sha256(f"{picture.dtype} {picture.shape} ".encode())
        digest.update(np.ascontiguousarray(picture).data)
        return digest.hexdigest()
    try:
        return hashlib.sha256(Path(picture).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{picture} cannot be read ({error.strerror or error}): make it again or take it out"
        ) from None


def compact(row: np.ndarray) -> np.ndarray:
    """As float32 where that loses nothing, as of most networks."""
    with np.errstate(over="ignore"):
        short = row.astype(np.float32)
    return short if (short.astype(np.float64) == row).all() else row
