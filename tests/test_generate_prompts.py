"""Weights and lengths of prompts in scripts/generate.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.tokens import piece_windows, tokenize
from scripts.generation.emphasis import pieces
from scripts.generation.encoding import MOST_WINDOWS, Encoder
from tests.tiny import tiny_pipeline, tiny_tokenizer
from train.config import UserError

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("a ((cat))!", [("a ", 1), ("cat", 1.21), ("!", 1)]),
        ("a [cat]", [("a ", 1), ("cat", 1 / 1.1)]),
        ("(a:1.3) b", [("a", 1.3), (" b", 1)]),
        ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1.0)]),
        ("(a : .5 )", [("a ", 0.5)]),
        (r"a \(cat\) \[x\] \\ \y", [(r"a (cat) [x] \ \y", 1)]),
        ("a (cat", [("a (cat", 1)]),
        ("a cat) :-]", [("a cat) :-]", 1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
        ("a: b, 16:9", [("a: b, 16:9", 1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("()", []),
    ],
)
def test_brackets(prompt, expected):
    found = pieces(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@given(st.text("ab ()[]:.1\\", max_size=40))
def test_any_text_has_weights_or_says_which_is_too_large(prompt):
    try:
        found = pieces(prompt)
    except UserError as error:
        assert "weighs" in str(error)
        return
    letters = [c for c in prompt if c in "ab"]
    assert [c for text, _ in found for c in text if c in "ab"] == letters


@given(st.text("ab ,é", max_size=60), st.integers(1, 5))
def test_pieces_of_a_plain_text_are_its_windows(text, times):
    text = text * times
    windows = piece_windows(TOKENIZER, [text], max_tokens=750)
    (ids,) = tokenize(TOKENIZER, [text], max_tokens=750)
    assert [token for window in windows for token, _ in window] == ids.tolist()
    owners = [owner for window in windows for _, owner in window]
    assert set(owners) <= {0, -1} and owners.count(0) == len(TOKENIZER(text).input_ids) - 2


def test_a_plain_prompt_is_encoded_as_the_pipeline_does(pipeline):
    encoder = Encoder(pipeline, weighting=True)
    for prompt in ("", "a cat", "x" * 70):
        theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(encoder.encode(prompt, 1), theirs)


def test_a_weight_moves_its_token_away_from_the_empty_prompt(pipeline):
    encoder = Encoder(pipeline, weighting=True)
    plain, empty = encoder.encode("a b", 1), encoder.encode("", 1)
    weighted = encoder.encode("a (b:1.5)", 1)
    assert torch.equal(weighted[:, :2], plain[:, :2])  # start, a
    expected = empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2])
    torch.testing.assert_close(weighted[:, 2], expected)
    torch.testing.assert_close(encoder.encode("a (b:0)", 1)[:, 2], empty[:, 2])
    literal = Encoder(pipeline, weighting=False).encode("a (b:1.5)", 1)
    theirs, _ = pipeline.encode_prompt("a (b:1.5)", "cpu", 1, False)
    assert torch.equal(literal, theirs)


def test_long_prompts_are_joined_windows_and_short_ones_filled_up(pipeline):
    encoder = Encoder(pipeline, weighting=True)
    first, second = "a " * 75, "b " * 10
    assert [encoder.windows(p) for p in (first, second, first + second)] == [1, 1, 2]
    both = encoder.encode(first + second, 2)
    parts = [encoder.encode(first, 1), encoder.encode(second, 1)]
    torch.testing.assert_close(both, torch.cat(parts, dim=1))
    filled = encoder.encode(second, 2)
    torch.testing.assert_close(filled, torch.cat([parts[1], encoder.encode("", 1)], dim=1))
    most = "a " * 75 * MOST_WINDOWS
    assert encoder.windows(most) == MOST_WINDOWS
    for far in (most + "a", "a" * 10**6):
        with pytest.raises(UserError, match="more than 16 windows of 75 tokens"):
            encoder.windows(far)


def test_a_word_of_several_embeddings_is_weighed_as_a_whole():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<owl>", "<owl>_1"])
    (window,) = piece_windows(tokenizer, ["a ", "<owl>", " b"], max_tokens=75)
    assert [owner for _, owner in window[:6]] == [-1, 0, 1, 1, 2, -1]
