"""Networks as functions of single pictures: a row has the same bits whatever else is embedded.

How many are in a batch decides which kernels multiply, and that moves a row by rounding in the last
place (measured: 1e-6 with CLIP ViT-L/14 on a CPU). On a CPU each item therefore goes through alone,
on one thread, several at once: no slower than batches, and neither the batch nor the order nor the
number of threads or processes can matter. On an accelerator all batches have one size, the last
one filled up, and nothing is rounded to TF32 or to half precision.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from data.examine import in_order
from eval.features import Picture, pixels_of
from eval.resizing import Input

if TYPE_CHECKING:
    import torch

BATCH = 32  # on an accelerator
VERSION = 1  # to be raised whenever a picture would get other features

T = TypeVar("T")


class Network:
    """What all extractors of pictures have in common; each says how it embeds a batch.

    `name`: where it was found; `fingerprint`: sha256 of its weights; `resize`: the convention, with
    its size in pixels; `dimension`: d; `cache_key`: all that features depend on but the picture.
    """

    def __init__(
        self,
        *,
        name: str,
        fingerprint: str,
        reads: Input,
        dimension: int,
        device: str | torch.device,
        settings: Any = None,
    ) -> None:
        import torch

        self.name, self.fingerprint, self.dimension = name, fingerprint, dimension
        self.reads, self.resize, self.side = reads, str(reads), reads.side
        self.device = torch.device(device)
        parts = [VERSION, type(self).__name__, fingerprint, repr(reads), self.device.type, settings]
        content = json.dumps(parts, sort_keys=True, default=str)
        self.cache_key = hashlib.sha256(content.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What must agree for two evaluations to be compared, and the name."""
        return {
            "name": self.name,
            "sha256": self.fingerprint,
            "resize": self.resize,
            "dimension": self.dimension,
        }

    def images(self, pictures: Iterable[Picture]) -> np.ndarray:
        """Features (N, d), float64, of uint8 RGB arrays (H, W, 3) or of image files, any size.

        An iterable is read as the work goes on: the pictures need not fit in memory together.
        """
        return stacked(rows(pictures, self._prepare, self._embed, self.device), self.dimension)

    def _prepare(self, picture: Picture) -> np.ndarray:
        return self.reads.prepare(pixels_of(picture))

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, side, side) to (B, d), each row of its own picture alone."""
        raise NotImplementedError


def rows(
    items: Iterable[T],
    prepare: Callable[[T], np.ndarray],
    embed: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> Iterator[np.ndarray]:
    """For each item, in their order, its row (d,), float64, of `embed` of a batch of what `prepare`
    makes of items."""
    with _full_precision():
        if device.type == "cpu":
            yield from _one_by_one(items, prepare, embed)
        else:
            yield from _in_batches(items, prepare, embed, device, BATCH)


def stacked(found: Iterable[np.ndarray], dimension: int) -> np.ndarray:
    """Rows as (N, d), of which there may be none."""
    every = list(found)
    return np.stack(every) if every else np.empty((0, dimension))


def _one_by_one(
    items: Iterable[T],
    prepare: Callable[[T], np.ndarray],
    embed: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[np.ndarray]:
    import torch

    def work(item: T) -> np.ndarray:
        with torch.inference_mode():
            # A copy is where torch puts it: the address has a say in which kernel multiplies.
            return embed(torch.from_numpy(prepare(item)).clone()[None])[0].double().numpy()

    threads = torch.get_num_threads()
    pending: deque[Future[np.ndarray]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what threads started later begin with


def _in_batches(
    items: Iterable[T],
    prepare: Callable[[T], np.ndarray],
    embed: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    size: int,
) -> Iterator[np.ndarray]:
    import torch

    rest = in_order(prepare, items)
    while batch := list(islice(rest, size)):
        full = np.stack([*batch, *batch[-1:] * (size - len(batch))])
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            found = embed(torch.from_numpy(full).to(device))[: len(batch)].cpu().double()
        yield from found.numpy()


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 is float32 and a convolution has one algorithm, whatever a training run has set."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def settings_of(config: Any) -> dict[str, Any]:
    """What a transformers configuration says of the arithmetic."""
    other = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
    content: dict[str, Any] = config.to_dict()
    return {key: value for key, value in content.items() if key not in other}


def levels(unit: Sequence[float]) -> tuple[float, ...]:
    """Means and standard deviations of pixels from 0 to 1 as of levels from 0 to 255."""
    return tuple(255 * float(value) for value in unit)
