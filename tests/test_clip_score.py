import numpy as np
import pytest

from eval.clip_score import clip_score, points, summarise


def test_cosine_per_sample_ignores_lengths():
    images = np.array([[2.0, 0], [0, 3], [1, 1]])
    texts = np.array([[5.0, 0], [1, 0], [-1, -1]])
    np.testing.assert_allclose(clip_score(images, texts), [1, 0, -1], atol=1e-15)


def test_shown_convention_is_cut_at_zero_per_sample():
    np.testing.assert_allclose(points(np.array([0.31, -0.2])), [31, 0])


def test_interval_of_independent_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    got = summarise(values)
    half = 1.96 * values.std() / 20
    assert got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((got.mean - half, got.mean + half), abs=0.03)
    assert got == summarise(values)


def test_repeats_of_a_prompt_add_no_certainty():
    values = np.random.default_rng(0).normal(size=50)
    groups = np.repeat(np.arange(50), 4)
    once, four = summarise(values), summarise(np.repeat(values, 4), groups)
    assert (four.n, four.groups) == (200, 50)
    assert (four.low, four.high) == pytest.approx((once.low, once.high))


def test_what_has_no_direction_is_refused():
    with pytest.raises(ValueError, match="zero or not finite"):
        clip_score(np.zeros((1, 2)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="prompts"):
        clip_score(np.ones((2, 2)), np.ones((1, 2)))
