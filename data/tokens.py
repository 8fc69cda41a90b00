"""Captions as the text encoder reads them: windows of 75 tokens between a start and an end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

WINDOW = 75  # tokens, without the two special ones
AT_ONCE = 1024  # captions

Ids = list[int]


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], *, max_tokens: int = WINDOW
) -> torch.Tensor:
    """Token ids, int64 (B, 77 * k): k, at least 1, is the most windows that a caption here needs.

    max_tokens: 75 times the most that k may be; what is beyond is cut. With 75 the result is that
    of `tokenizer(captions, padding="max_length", truncation=True, max_length=77)`.

    A window is the start token, up to 75 tokens, the end token and padding. Each is to be encoded
    by itself and the results joined along the sequence, as ComfyUI and AUTOMATIC1111 read long
    prompts. A word that would lie across a border goes to the next window as a whole, unless it is
    longer than a window or no further window is allowed. A word of several embeddings is read as
    all of them, as pipelines read it, and is one such word. Captions that need fewer than k end in
    windows of the empty caption. A special token that a caption spells out ("<|endoftext|>") is
    read as that token, as pipelines read it, and counts as one of the 75.
    """
    import torch

    rows = [windows for _, windows in _windows_of(tokenizer, captions, max_tokens)]
    count = max(map(len, rows), default=1)
    framed = [
        [token for window in row + [[]] * (count - len(row)) for token in _frame(tokenizer, window)]
        for row in rows
    ]
    return torch.tensor(framed, dtype=torch.int64).reshape(len(rows), count * (WINDOW + 2))


def piece_windows(
    tokenizer: CLIPTokenizer, pieces: Sequence[str], *, max_tokens: int
) -> list[list[tuple[int, int]]]:
    """The windows, as `tokenize` has them, of a caption given in pieces that are read one by one:
    of each of the 77 tokens its id, and the number of the piece that it is of, or -1 for none."""
    ids: Ids = []
    words: list[int | None] = []
    owners: list[int] = []
    for number, (its_ids, its_words) in enumerate(_read(tokenizer, pieces)):
        words += [None if word is None else len(ids) + word for word in its_words]
        owners += [number] * len(its_ids)
        ids += its_ids
    windows = [ids] if len(ids) <= WINDOW else _cut(ids, words, max_tokens // WINDOW)
    owner = iter(owners)
    return [
        [
            (token, next(owner) if 0 < place <= len(window) else -1)
            for place, token in enumerate(_frame(tokenizer, window))
        ]
        for window in windows
    ]


def count_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[int]:
    """The length of each whole caption in tokens, without the two special ones."""
    return [len(ids) for ids, _ in _read(tokenizer, captions)]


def cut_captions(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int = WINDOW
) -> list[tuple[int, int]]:
    """The index and the length in tokens of every caption that `tokenize` cuts."""
    return [
        (index, length)
        for index, (length, windows) in enumerate(_windows_of(tokenizer, captions, max_tokens))
        if length > sum(map(len, windows))
    ]


def embedding_names(token: str, vectors: int) -> list[str]:
    """What the tokenizer calls the embeddings of a word of textual inversion: `<owl>`, `<owl>_1`
    and so on, as diffusers' `load_textual_inversion` does."""
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def _several(tokenizer: CLIPTokenizer) -> dict[int, Ids]:
    """All ids of each word of several embeddings, by the first of them, from the names that the
    tokenizer has (as diffusers' `maybe_convert_prompt` finds them)."""
    added: dict[str, int] = tokenizer.added_tokens_encoder
    found: dict[int, Ids] = {}
    for token, first in added.items():
        ids = [first]
        while (following := added.get(f"{token}_{len(ids)}")) is not None:
            ids.append(following)
        if len(ids) > 1:
            found[first] = ids
    return found


def _windows_of(
    tokenizer: CLIPTokenizer, captions: Sequence[str], max_tokens: int
) -> Iterator[tuple[int, list[Ids]]]:
    """Each caption's length and its tokens by window."""
    assert max_tokens >= WINDOW and max_tokens % WINDOW == 0
    most = max_tokens // WINDOW
    for ids, words in _read(tokenizer, captions):
        yield len(ids), [ids] if len(ids) <= WINDOW else _cut(ids, words, most)


def _cut(ids: Ids, words: Sequence[int | None], most: int) -> list[Ids]:
    """At most `most` windows; `words` has the number of each token's word."""
    windows: list[Ids] = [[]]
    rest = iter(ids)
    for _, tokens in groupby(words):
        word = [next(rest) for _ in tokens]
        room = WINDOW - len(windows[-1])
        if room < len(word) <= WINDOW and len(windows) < most:
            windows.append([])
            room = WINDOW
        while True:
            windows[-1] += word[:room]
            word, room = word[room:], WINDOW
            if not word:
                break
            if len(windows) == most:
                return windows
            windows.append([])
    return windows


def _frame(tokenizer: CLIPTokenizer, ids: Ids) -> Ids:
    """The 77 tokens of one window."""
    padding = [tokenizer.pad_token_id] * (WINDOW - len(ids))
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding]


def _read(
    tokenizer: CLIPTokenizer, captions: Sequence[str]
) -> Iterator[tuple[Ids, Sequence[int | None]]]:
    """Each caption's tokens, and the number of the word that each token is of."""
    several = _several(tokenizer)
    for start in range(0, len(captions), AT_ONCE):
        # Not verbose: no warning about captions longer than the model's limit, which is the point.
        batch = tokenizer(
            list(captions[start : start + AT_ONCE]),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        for index, ids in enumerate(batch.input_ids):
            words = batch.word_ids(index)
            yield _expanded(ids, words, several) if several else (ids, words)


def _expanded(
    ids: Ids, words: Sequence[int | None], several: dict[int, Ids]
) -> tuple[Ids, Sequence[int | None]]:
    """With every embedding of a word of several, all of the same word."""
    pairs = [
        (one, word) for id, word in zip(ids, words, strict=True) for one in several.get(id, [id])
    ]
    return [id for id, _ in pairs], [word for _, word in pairs]
