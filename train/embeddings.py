"""The embeddings of new words as the only trainable rows of a text encoder's table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from train.config import UserError
from train.new_tokens import NewToken


class Embeddings(nn.Module):
    """A table (V, D) whose weight is frozen, and trainable rows (n, D), fp32, for the ids (n,).

    forward: ids (...) -> embeddings (..., D) in the table's dtype, as a table with `values` in it
    would give them. Only the rows get a gradient, so that no optimizer state, weight decay or
    rounding touches the rest.

    The values are the rows, shortened where they are longer than the longest of the table: Adam
    carries rows far beyond it where its rate is high, and the text encoder never saw such. On the
    toy world at a sane rate that changed nothing (75 % of the way to the real subject with and
    without), at three times that rate it kept 75 % against 66 % at six times the longest norm.
    """

    def __init__(self, table: nn.Embedding, ids: Sequence[int], rows: Tensor) -> None:
        super().__init__()
        self.weight = table.weight.requires_grad_(False)  # first: its dtype is the encoder's
        self.rows = nn.Parameter(rows.to(torch.float32))
        self.ids: Tensor
        self.longest: Tensor
        ids_ = torch.tensor(ids, device=table.weight.device)
        self.register_buffer("ids", ids_, persistent=False)
        self.register_buffer("longest", self.weight.float().norm(dim=1).max(), persistent=False)

    def values(self) -> Tensor:
        """The rows as they are used, (n, D)."""
        length = self.rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self.rows * (self.longest / length).clamp(max=1)

    def forward(self, ids: Tensor) -> Tensor:
        match = ids.unsqueeze(-1) == self.ids  # (..., n)
        new = match.any(-1)
        frozen = functional.embedding(ids.masked_fill(new, 0), self.weight)
        trained = functional.embedding(match.int().argmax(-1), self.values())
        return torch.where(new.unsqueeze(-1), trained.to(frozen.dtype), frozen)


def attach(text_encoder: Any, tokens: Sequence[NewToken]) -> Embeddings:
    """Gives the text encoder trainable rows for the tokens, at their start values."""
    table = text_encoder.get_input_embeddings()
    ids = [id for token in tokens for id in token.ids]
    rows = torch.cat([start(table.weight, token) for token in tokens])
    embeddings = Embeddings(table, ids, rows)
    text_encoder.set_input_embeddings(embeddings)
    return embeddings


@torch.no_grad()
def start(table: Tensor, token: NewToken) -> Tensor:
    """The rows (n, D), fp32, that a token of n embeddings starts from: those of its m words.

    As many: each its own. More, n > m: the words again from the first, as if the caption said
    them several times. Fewer, n < m: the mean of consecutive words, at the words' mean norm: a mean
    of different rows is shorter than any row of the table, and the text encoder never saw one.
    """
    words = table[torch.tensor(token.initial, device=table.device)].float()  # (m, D)
    wanted = len(token.ids)
    if wanted >= len(words):
        return words[torch.arange(wanted, device=words.device) % len(words)]
    return torch.stack([_mean(group) for group in words.tensor_split(wanted)])


def _mean(rows: Tensor) -> Tensor:
    mean = rows.mean(dim=0)
    return mean * (rows.norm(dim=-1).mean() / mean.norm().clamp(min=1e-12))


def save(embeddings: Embeddings, tokens: Sequence[NewToken], directory: Path) -> None:
    """Writes each token's values as {token: (n, D)}, fp32, as diffusers' `load_textual_inversion`
    reads it: learned_embeds.safetensors for one token, learned_embeds-NAME.safetensors for several.

    Raises UserError where they are not finite.
    """
    counts = [len(token.ids) for token in tokens]
    parts = embeddings.values().detach().cpu().split(counts)
    for token, name, rows in zip(tokens, file_names(tokens), parts, strict=True):
        if not rows.isfinite().all():
            raise UserError(
                f"the embeddings of {token.token} are not finite: training diverged; lower "
                "optim.learning_rate"
            )
        save_file({token.token: rows.contiguous()}, directory / name)


def file_names(tokens: Sequence[NewToken]) -> list[str]:
    """One for each token, of letters that any file system takes; numbered where they would be
    alike."""
    if len(tokens) == 1:
        return ["learned_embeds.safetensors"]
    plain = [re.sub(r"[^A-Za-z0-9_-]", "", token.token) for token in tokens]
    twice = len(set(plain)) < len(plain) or "" in plain
    stems = [f"{index}-{name}" if twice else name for index, name in enumerate(plain, 1)]
    return [f"learned_embeds-{stem}.safetensors" for stem in stems]
