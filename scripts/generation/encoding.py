"""Prompts as the UNet sees them: of any length, and weighted."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from data.tokens import WINDOW, piece_windows
from scripts.generation import emphasis
from train.config import UserError

if TYPE_CHECKING:
    import torch

MOST_WINDOWS = 16
_MOST_CHARACTERS = 100 * WINDOW * MOST_WINDOWS


class Encoder:
    """Embeddings of prompts, each encoded by itself, so that they do not depend on one another.

    Windows of 75 tokens are encoded one by one and joined, as web UIs do. A weight w moves a
    token's embedding e from the one e0 that the empty prompt has in its place: e0 + w (e - e0), as
    ComfyUI has it. (AUTOMATIC1111 multiplies e, and divides by what that did to the mean of all,
    which goes wrong where the mean is next to nothing.)
    """

    def __init__(self, pipeline: Any, *, weighting: bool) -> None:
        self._pipeline, self._weighting = pipeline, weighting
        self._tokens = lru_cache(maxsize=4096)(self._read)
        self._embeddings = lru_cache(maxsize=8)(self._encoded)

    def windows(self, prompt: str) -> int:
        """How many of 75 tokens it takes. Raises UserError for one that is far too long."""
        return len(self._tokens(prompt)[0])

    def encode(self, prompt: str, windows: int) -> torch.Tensor:
        """The embeddings (1, 77 * windows, D) of a prompt that takes no more than that."""
        import torch

        missing = windows - self.windows(prompt)
        empty = [self._embeddings("")] * missing
        return torch.cat([self._embeddings(prompt), *empty]).flatten(0, 1)[None]

    def _read(self, prompt: str) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and weights of the tokens of each window."""
        if len(prompt) > _MOST_CHARACTERS:
            raise _too_long(prompt)
        plain = [(prompt, 1.0)]
        weighted = emphasis.pieces(prompt) or [("", 1.0)] if self._weighting else plain
        texts, factors = zip(*weighted, strict=True)
        most = (MOST_WINDOWS + 1) * WINDOW
        windows = piece_windows(self._pipeline.tokenizer, texts, max_tokens=most)
        if len(windows) > MOST_WINDOWS:
            raise _too_long(prompt)
        ids = [[token for token, _ in window] for window in windows]
        weights = [[1.0 if k < 0 else factors[k] for _, k in window] for window in windows]
        return ids, weights

    def _encoded(self, prompt: str) -> torch.Tensor:
        """(windows, 77, D)"""
        import torch

        ids, weights = self._tokens(prompt)
        embeddings = self._run(torch.tensor(ids))
        if all(weight == 1 for row in weights for weight in row):
            return embeddings
        empty = self._embeddings("").float()  # (1, 77, D)
        factor = torch.tensor(weights, device=empty.device)[..., None]
        moved = empty + factor * (embeddings.float() - empty)
        return torch.where(factor == 1, embeddings, moved.to(embeddings.dtype))

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.no_grad():  # where the parts are offloaded, their own device is not the place
            return self._pipeline.text_encoder(ids.to(self._pipeline._execution_device))[0]


def _too_long(prompt: str) -> UserError:
    return UserError(
        f"prompt: {prompt[:40]!r}... takes more than {MOST_WINDOWS} windows of {WINDOW} tokens: "
        "shorten it"
    )
