"""The measures of DreamBooth, against their definitions spelled out."""

import numpy as np
import pytest

from eval.subject import diversity, likeness, prior_preservation, real_likeness, unit


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(7, 5))


def cosine(a, b):
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def test_likeness_is_the_mean_cosine_to_every_real_picture(rows):
    made, real = rows[:3], rows[3:]
    expected = [sum(cosine(a, b) for b in real) / 4 for a in made]
    np.testing.assert_allclose(likeness(made, real), expected, rtol=1e-12)
    np.testing.assert_allclose(prior_preservation(made, real), expected, rtol=1e-12)


def test_the_length_of_features_does_not_matter(rows):
    scale = np.arange(1, 8)[:, None]
    np.testing.assert_allclose(likeness(rows * scale, 3 * rows), likeness(rows, rows), rtol=1e-12)
    np.testing.assert_allclose(real_likeness(rows * scale), real_likeness(rows), rtol=1e-12)


def test_a_real_picture_is_not_compared_with_itself(rows):
    expected = [likeness(rows[[k]], np.delete(rows, k, 0))[0] for k in range(7)]
    np.testing.assert_allclose(real_likeness(rows), expected, rtol=1e-12)
    np.testing.assert_allclose(real_likeness(np.eye(3)), 0, atol=1e-12)


def test_diversity_is_within_a_prompt_and_by_its_first_appearance():
    a, b = np.eye(2)
    pictures = np.array([a, b, a, 2 * b, a])
    found = diversity(pictures, ["second", "first", "second", "second", "alone"])
    # second: a, a, b are three pairs, two of them at right angles
    np.testing.assert_allclose(found, [2 / 3, np.nan, np.nan])
    assert diversity(pictures, [0] * 5)[0] == pytest.approx(6 / 10)


def test_half_precision_features_are_judged_in_double():
    rows = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float16)
    assert likeness(rows, rows).dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(unit(rows), axis=1), 1, rtol=1e-14)


def test_a_picture_without_features_is_like_nothing():
    assert likeness(np.zeros((1, 3)), np.ones((2, 3)))[0] == 0


def test_what_cannot_be_compared_is_refused(rows):
    for wrong in (
        lambda: likeness(rows, rows[:0]),
        lambda: real_likeness(rows[:1]),
        lambda: diversity(rows, [0]),
        lambda: unit(rows[0]),
    ):
        with pytest.raises(ValueError):
            wrong()
