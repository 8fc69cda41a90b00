import numpy as np
import pytest

from eval.clip_score import clip_score, points


def test_cosine_per_sample_ignores_lengths():
    images = np.array([[2.0, 0], [0, 3], [1, 1]])
    texts = np.array([[5.0, 0], [1, 0], [-1, -1]])
    np.testing.assert_allclose(clip_score(images, texts), [1, 0, -1], atol=1e-15)


def test_shown_convention_is_cut_at_zero_per_sample():
    np.testing.assert_allclose(points(np.array([0.31, -0.2])), [31, 0])


def test_what_has_no_direction_is_refused():
    with pytest.raises(ValueError, match="zero or not finite"):
        clip_score(np.zeros((1, 2)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="prompts"):
        clip_score(np.ones((2, 2)), np.ones((1, 2)))
