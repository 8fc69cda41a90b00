"""How far pictures moved, measured by what another seed changes."""

import numpy as np
import pytest

from eval.forgetting import GENERAL, forgetting


@pytest.fixture
def base():
    """Two pictures of each of ten prompts."""
    return np.random.default_rng(0).normal(size=(20, 6))


PROMPTS = np.repeat(np.arange(10), 2).tolist()


def test_the_same_pictures_are_at_nought(base):
    np.testing.assert_allclose(forgetting(base, 2 * base, PROMPTS).relative, 0, atol=1e-12)


def test_pictures_by_another_seed_are_at_one(base):
    swapped = base.reshape(10, 2, 6)[:, ::-1].reshape(20, 6)
    assert forgetting(base, swapped, PROMPTS).relative.mean() == pytest.approx(1)


def test_the_yardstick_is_the_same_from_prompts_or_from_other_seeds(base):
    first, second = base[::2], base[1::2]
    apart = forgetting(first, second, other_seeds=second)
    assert apart.relative.mean() == pytest.approx(1)
    assert apart.yardstick == pytest.approx(forgetting(base, base, PROMPTS).yardstick)


def test_distances_are_of_rows_that_belong_together(base):
    expected = [
        1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(base[:10], base[10:], strict=True)
    ]
    np.testing.assert_allclose(forgetting(base[:10], base[10:]).distances, expected, rtol=1e-12)


def test_prompts_count_alike_however_many_pictures_they_have():
    a, b = np.eye(2)
    pictures = np.array([a, b, a, a, a, a])  # 1 apart in one prompt, 0 in the other
    assert forgetting(pictures, pictures, [0, 0, 1, 1, 1, 1]).yardstick == pytest.approx(0.5)


def test_values_by_prompt_average_to_the_ratio_and_vary_with_both_of_its_parts(base):
    rng = np.random.default_rng(1)
    found = forgetting(base, base + 0.5 * rng.normal(size=base.shape), PROMPTS)
    assert found.by_prompt.mean() == pytest.approx(found.relative.mean())
    with_each_left_out = []
    for prompt in range(10):
        kept = [k for k in range(20) if PROMPTS[k] != prompt]
        rest = np.array(PROMPTS)[kept].tolist()
        moved = (base + 0.5 * np.random.default_rng(1).normal(size=base.shape))[kept]
        with_each_left_out.append(forgetting(base[kept], moved, rest).relative.mean())
    jackknife = np.sqrt(9 * np.var(with_each_left_out))
    assert found.by_prompt.std(ddof=1) / np.sqrt(10) == pytest.approx(jackknife, rel=0.1)
    swapped = base.reshape(10, 2, 6)[:, ::-1].reshape(20, 6)
    np.testing.assert_allclose(forgetting(base, swapped, PROMPTS).by_prompt, 1)


def test_a_seed_that_changes_a_hundredth_of_what_prompts_do_is_no_yardstick(base):
    first, rng = base[::2], np.random.default_rng(2)
    nearly, clearly = (first + noise * rng.normal(size=first.shape) for noise in (0.01, 0.3))
    assert np.isnan(forgetting(first, nearly, other_seeds=nearly).by_prompt).all()
    assert forgetting(first, clearly, other_seeds=clearly).by_prompt.mean() == pytest.approx(1)


def test_without_another_seed_there_is_no_yardstick(base):
    found = forgetting(base, base[::-1])
    assert np.isnan(found.relative).all() and np.isfinite(found.distances).all()
    always_one = np.repeat(base[:1], 4, 0)
    assert np.isnan(forgetting(always_one, base[:4], [0, 0, 1, 1]).relative).all()


def test_pictures_that_do_not_go_together_are_refused(base):
    for wrong in (
        lambda: forgetting(base, base[:-1]),
        lambda: forgetting(base, base, [0]),
        lambda: forgetting(base, base, other_seeds=base[:3]),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_general_prompts_are_different_and_name_no_subject():
    assert len(set(GENERAL)) == len(GENERAL) >= 24
    assert not any("{" in prompt for prompt in GENERAL)
