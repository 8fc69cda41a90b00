import numpy as np
import pytest

from eval.frechet import frechet_from_features
from eval.frechet_jackknife import jackknife


def _features(seed: int, n: int, d: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


@pytest.mark.parametrize(("n", "d"), [(40, 60), (60, 5)])
def test_it_is_the_distances_and_what_they_are_without_each_prompt(n, d):
    reference, a, b = _features(1, n, d), _features(2, n, d), _features(3, n, d, 0.5)
    prompts = np.arange(n) // 2  # so that all blocks are alike
    found = jackknife(reference, a, b, groups=prompts, reference_groups=prompts)
    without = []
    for prompt in range(n // 2):
        kept = prompts != prompt
        without.append([frechet_from_features(rows[kept], reference[kept]) for rows in (a, b)])
    whole = np.array([frechet_from_features(rows, reference) for rows in (a, b)])
    assert found.distances == pytest.approx(whole, rel=1e-9)
    count, spread = n // 2, np.var(without, axis=0) * (n // 2 - 1)  # the textbook's
    errors = [found.estimate(1, 0).standard_error, found.estimate(0, 1).standard_error]
    assert errors == pytest.approx(np.sqrt(spread), rel=1e-6)
    change = found.estimate(-1, 1)
    assert change.value == pytest.approx(whole[1] - whole[0])
    moved = np.subtract(*np.transpose(without))
    assert change.standard_error == pytest.approx(np.sqrt(moved.var() * (count - 1)), rel=1e-6)
    assert change.freedom == count - 1


def test_equal_sets_have_no_change():
    reference, a = _features(1, 30, 4), _features(2, 20, 4)
    assert jackknife(reference, a, a).estimate(-1, 1)[:2] == (0, 0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_error_is_the_spread_of_repeated_draws(shared):
    values, errors = [], []
    prompts = np.repeat(range(60), 2)
    for seed in range(120):
        rng = np.random.default_rng(seed)
        content = rng.normal(size=(60, 3))
        told = content[prompts[::2]] if shared else rng.normal(size=(60, 3))
        reference = 2 * told + rng.normal(size=(60, 3))
        a = 2 * content[prompts] + rng.normal(size=(120, 3)) + 3
        captions = range(60) if shared else range(60, 120)
        found = jackknife(reference, a, groups=prompts, reference_groups=captions).estimate(1)
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.median(errors) / np.std(values) == pytest.approx(1, abs=0.2)


def test_blocks_of_several_prompts_of_unlike_sizes_tell_about_the_same():
    rng = np.random.default_rng(0)
    prompts = np.repeat(range(90), rng.integers(1, 6, size=90))
    reference, a = _features(1, 300, 40), _features(2, len(prompts), 40, 0.3)
    fine = jackknife(reference, a, groups=prompts, blocks=90).estimate(1)
    coarse = jackknife(reference, a, groups=prompts).estimate(1)
    assert coarse.standard_error == pytest.approx(fine.standard_error, rel=0.3)
    assert (fine.freedom, coarse.freedom) == (89, 39)


@pytest.mark.parametrize(
    ("prompts", "captions"),
    [([0] * 8, range(8)), (range(8), [9] * 8), ([0] * 8, [0] * 8)],
)
def test_of_one_prompt_or_caption_the_error_is_not_known(prompts, captions):
    found = jackknife(
        _features(1, 8, 3), _features(2, 8, 3), groups=prompts, reference_groups=captions
    )
    assert not found.estimate(1).known and np.isfinite(found.distances).all()


def test_where_too_little_would_be_left_the_error_is_not_known():
    found = jackknife(_features(1, 9, 3), _features(2, 2, 3)).estimate(1)
    assert not found.known and np.isfinite(found.value)


def test_a_single_caption_that_was_no_prompt_goes_with_the_others():
    reference, a = _features(1, 11, 3), _features(2, 10, 3)
    found = jackknife(reference, a, groups=range(10), reference_groups=range(11))
    assert found.estimate(1).known and len(found.parts) == 11
