import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from data.tokens import WINDOW, count_tokens, cut_captions, embedding_names, tokenize
from tests.tiny import tiny_tokenizer
from train.config import ROOT

TINY = tiny_tokenizer()
TOKENIZERS = {
    "tiny": TINY,
    "toy": CLIPTokenizer.from_pretrained(ROOT / "data/assets/toy-base/tokenizer"),
}
AWKWARD = [
    "",
    "a red cat's hat, isn't it!!! 123",
    "é 日本語 🎉 zz",
    "<|endoftext|>",
    "a <|startoftext|> b <|endoftext|> c",
    "word " * 200,
    "x" * 200,
    "! " * 100,
]
few = st.lists(st.text("ab'1!, ", min_size=1, max_size=20), max_size=8).map(" ".join)
words = st.builds(lambda text, count: f"{text} " * count, few, st.integers(1, 12))


def reference(tokenizer, captions):
    """What pipelines feed the text encoder."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    ).input_ids


def windows(tokenizer, caption, max_tokens=225):
    """The tokens that `tokenize` puts into each window, whose frame is checked."""
    (row,) = tokenize(tokenizer, [caption], max_tokens=max_tokens)
    length = min(count_tokens(tokenizer, [caption])[0], max_tokens)
    found = []
    for window in row.view(-1, WINDOW + 2).tolist():
        assert window[0] == tokenizer.bos_token_id
        inside = WINDOW + 1
        while inside and window[inside] != tokenizer.eos_token_id:
            assert window[inside] == tokenizer.pad_token_id
            inside -= 1
        assert inside, "a window without its end"
        found.append(window[1:inside])
    assert sum(map(len, found)) <= length
    return found


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_one_window_is_what_a_pipeline_reads(tokenizer):
    assert torch.equal(tokenize(tokenizer, AWKWARD), reference(tokenizer, AWKWARD))
    many = [f"{'cat ' * (k % 90)}{k}" for k in range(1500)]
    assert torch.equal(tokenize(tokenizer, many), reference(tokenizer, many))


@given(words)
@settings(deadline=None, max_examples=60)
def test_windows_keep_words_whole_and_lose_only_what_is_reported(caption):
    ids = TINY(caption, add_special_tokens=False, verbose=False).input_ids
    assert count_tokens(TINY, [caption]) == [len(ids)]
    found = windows(TINY, caption)
    read = [token for window in found for token in window]
    assert read == ids[: len(read)]
    assert bool(cut_captions(TINY, [caption], 225)) == (len(read) < len(ids))
    last = [TINY.convert_ids_to_tokens(window[-1]) for window in found if window]
    assert all(token.endswith("</w>") or token == "!" for token in last[:-1])
    assert torch.equal(tokenize(TINY, [caption]), reference(TINY, [caption]))


def test_a_word_across_a_border_goes_to_the_next_window():
    letters = "abcdefgh"  # a word of 8 tokens
    assert [len(w) for w in windows(TINY, f"{letters} " * 10, 150)] == [72, 8]
    # The last window is filled like a pipeline's only one: with as much of the word as it holds.
    caption = f"{letters} " * 19
    assert [len(w) for w in windows(TINY, caption, 150)] == [72, 75]
    assert cut_captions(TINY, ["a", caption], 150) == [(1, 152)]
    assert not cut_captions(TINY, [caption], 225)


def test_a_word_longer_than_a_window_is_split():
    assert [len(w) for w in windows(TINY, "a b " + "x" * 160)] == [75, 75, 12]
    assert [len(w) for w in windows(TINY, "a b " + "x" * 75)] == [2, 75]


def test_words_across_a_border_can_cost_the_last_tokens():
    """150 tokens do not fit into two windows where the first ends early."""
    caption = "a " * 74 + "bc " + "a " * 74
    assert count_tokens(TINY, [caption]) == [150]
    assert cut_captions(TINY, [caption], 150) == [(0, 150)]
    assert [len(w) for w in windows(TINY, caption)] == [74, 75, 1]


def test_captions_of_a_call_have_as_many_windows_as_the_longest():
    tokens = tokenize(TINY, ["a", "a " * 100], max_tokens=225)
    assert tokens.shape == (2, 2 * 77) and tokens.dtype == torch.int64
    assert torch.equal(tokens[0, 77:], reference(TINY, [""])[0])
    assert tokenize(TINY, ["a", "b"], max_tokens=225).shape == (2, 77)
    assert tokenize(TINY, ["a " * 999], max_tokens=225).shape == (1, 3 * 77)
    assert tokenize(TINY, []).shape == (0, 77)


def test_special_tokens_in_a_caption_leave_the_frame_whole():
    found = windows(TINY, "a <|endoftext|> <|startoftext|> b " * 30)
    assert [len(window) for window in found] == [75, 45]


def test_no_warning_about_long_captions(caplog):
    tokenizer = tiny_tokenizer()  # the warning is given once per tokenizer
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            tokenize(tokenizer, ["a " * 99], max_tokens=150)
            count_tokens(tokenizer, ["a " * 99])
            assert "longer than" not in caplog.text
            tokenizer("a " * 99)
            assert "longer than" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


# Words of several embeddings


def with_owl(vectors=3):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(embedding_names("<owl>", vectors))
    return tokenizer


@pytest.mark.parametrize(
    "caption",
    ["an <owl> on a tree", "<owl>", "x<owl>s, <owl> <owl>", "a " * 74 + "<owl>", "a " * 99],
)
def test_a_word_of_several_embeddings_is_read_as_a_pipeline_reads_it(caption):
    from diffusers.loaders import TextualInversionLoaderMixin

    tokenizer = with_owl()
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(caption, tokenizer)
    assert torch.equal(tokenize(tokenizer, [caption]), reference(tokenizer, [converted]))
    assert torch.equal(tokenize(with_owl(1), [caption]), reference(with_owl(1), [caption]))


def test_it_counts_in_full_stays_whole_in_windows_and_is_reported_where_it_is_cut():
    tokenizer, caption = with_owl(), "a " * 73 + "<owl>"
    assert count_tokens(tokenizer, [caption]) == [76]
    assert cut_captions(tokenizer, [caption]) == [(0, 76)]
    assert [len(window) for window in windows(tokenizer, caption, 150)] == [73, 3]
    assert [len(window) for window in windows(tokenizer, "a " * 72 + "<owl>", 150)] == [75]
