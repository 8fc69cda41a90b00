import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid

from eval.frechet import (
    Moments,
    expected_bias,
    fid_infinity,
    frechet_distance,
    frechet_from_features,
    small_sample_warning,
)
from train.config import UserError


def _features(seed: int, n: int, d: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def _fid(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


def _gaussian(mean: np.ndarray, cov: np.ndarray, n: int = 11) -> Moments:
    moments = Moments(len(mean))
    moments.n, moments.mean, moments.m2 = n, mean, cov * (n - 1)
    return moments


def test_diagonal_gaussians_have_the_closed_form():
    rng = np.random.default_rng(0)
    a, b, shift = rng.uniform(0, 4, 8), rng.uniform(0, 4, 8), rng.normal(size=8)
    got = frechet_distance(_gaussian(np.zeros(8), np.diag(a)), _gaussian(shift, np.diag(b)))
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert got == pytest.approx(expected, rel=1e-12)


def test_it_is_symmetric_and_zero_for_equal_sets():
    a, b = _features(1, 100), _features(2, 80)
    assert _fid(a, b) == pytest.approx(_fid(b, a), rel=1e-10)
    assert _fid(a, a) == pytest.approx(0, abs=1e-5)


def test_rotation_and_translation_leave_it_and_scale_squares_it():
    a, b = _features(1, 100), _features(2, 80)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0]
    assert _fid(a @ rotation + 5, b @ rotation + 5) == pytest.approx(_fid(a, b), rel=1e-9)
    assert _fid(3 * a, 3 * b) == pytest.approx(9 * _fid(a, b), rel=1e-10)


def test_agrees_with_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 12

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    a, b = _features(1, 300), _features(2, 200)
    metric = FrechetInceptionDistance(feature=Identity(), normalize=True).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert _fid(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_agrees_with_the_arithmetic_of_clean_fid():
    a, b = _features(1, 300), _features(2, 200)
    offset, covs = a.mean(0) - b.mean(0), (np.cov(a, rowvar=False), np.cov(b, rowvar=False))
    root = np.sqrt(np.linalg.eigvals(covs[0] @ covs[1]).astype(complex)).real.sum()
    expected = offset @ offset + np.trace(covs[0]) + np.trace(covs[1]) - 2 * root
    assert _fid(a, b) == pytest.approx(expected, rel=1e-9)
    tensors = [torch.from_numpy(x) for x in (a.mean(0), covs[0], b.mean(0), covs[1])]
    assert _fid(a, b) == pytest.approx(float(_compute_fid(*tensors)), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 2100), max_size=6).map(sorted),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_any_split_over_processes_in_any_order_equals_one_pass(cuts, order, offset):
    features = _features(1, 2100, d=5) + offset
    parts = [Moments.of(part) for part in np.split(features, cuts)]
    order.shuffle(parts)
    total, batched = Moments(5), Moments(5)
    for part in parts:
        total.merge(part)
    for batch in np.split(features, cuts):
        batched.update(batch)
    cov = np.cov(features - offset, rowvar=False)
    for moments in (total, batched):
        assert moments.n == 2100
        np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(moments.cov, cov, rtol=1e-10, atol=1e-10 * cov.max())
    whole = _fid(features, _features(2, 50, d=5) + offset)
    assert frechet_distance(total, Moments.of(_features(2, 50, d=5) + offset)) == pytest.approx(
        whole, rel=1e-10
    )


def test_merging_leaves_the_other_as_it_was():
    a, b = Moments.of(_features(1, 20)), Moments.of(_features(2, 20))
    before = b.m2.copy(), b.mean.copy()
    empty = Moments(12)
    empty.merge(b)
    empty.merge(a)
    assert (b.m2 == before[0]).all() and (b.mean == before[1]).all() and b.n == 20


def test_a_large_offset_costs_no_digits():
    a, b = _features(1, 200), _features(2, 200)
    assert _fid(a + 1e4, b + 1e4) == pytest.approx(_fid(a, b), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(20, 30), (20, 100), (100, 20), (60, 70)])
def test_all_routes_agree_with_few_samples_on_either_side(n, m):
    a, b = _features(1, n, d=40), _features(2, m, d=40)
    expected = _fid(a, b)
    assert frechet_from_features(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_from_features(a, Moments.of(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_from_features(Moments.of(a), b) == pytest.approx(expected, rel=1e-6)
    assert frechet_from_features(Moments.of(a), Moments.of(b)) == expected


def test_features_that_are_always_zero_or_repeated_change_nothing():
    a, b = _features(1, 100), _features(2, 80)
    wider = [np.hstack([x, np.zeros((len(x), 3))]) for x in (a, b)]
    assert _fid(*wider) == pytest.approx(_fid(a, b), rel=1e-9)
    faint = [np.hstack([x, np.zeros((len(x), 1))]) / 1000 for x in (a, b)]
    assert _fid(*faint) == pytest.approx(_fid(a, b) / 1e6, rel=1e-9)
    twice = [np.hstack([x, x]) for x in (a, b)]
    assert _fid(*twice) == pytest.approx(2 * _fid(a, b), rel=1e-6)


def test_bias_formula_matches_the_published_case_and_simulation():
    assert expected_bias(64, 1024) == pytest.approx((128 + 64 * 65 / 2) / 1024)
    rng = np.random.default_rng(0)
    draws = [_fid(rng.normal(size=(1024, 64)), rng.normal(size=(1024, 64))) for _ in range(8)]
    assert np.mean(draws) == pytest.approx(2.157, rel=0.03)


def test_bias_of_unequal_counts_and_spectrum_matches_simulation():
    rng, spectrum = np.random.default_rng(0), np.geomspace(0.01, 4, 10)
    scale = np.sqrt(spectrum)
    draws = [
        _fid(rng.normal(size=(300, 10)) * scale, rng.normal(size=(900, 10)) * scale)
        for _ in range(200)
    ]
    assert expected_bias(spectrum, 300, 900) == pytest.approx(np.mean(draws), rel=0.08)


def _population(spectrum: np.ndarray) -> Moments:
    return _gaussian(np.zeros(len(spectrum)), np.diag(spectrum), n=10**9)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.0, 1.3)])
def test_fid_infinity_finds_the_distance_of_the_distributions_and_its_error(shift, scale):
    rng, spectrum, n = np.random.default_rng(0), np.geomspace(1, 0.01, 12), 120
    truth = shift**2 + ((scale - 1) ** 2 * spectrum).sum()
    sets = [scale * rng.normal(size=(n, 12)) * np.sqrt(spectrum) for _ in range(100)]
    for features in sets:
        features[:, 0] += shift
    reference = _population(spectrum)
    estimates = [fid_infinity(features, reference) for features in sets]
    plain = np.mean([frechet_distance(Moments.of(features), reference) for features in sets])
    bias = np.mean([estimate.value for estimate in estimates]) - truth
    assert abs(bias) < 0.12 * (plain - truth)
    held = np.mean([estimate.low < truth < estimate.high for estimate in estimates])
    assert held >= 0.9
    spread = np.std([estimate.value for estimate in estimates])
    assert 0.8 < np.median([estimate.standard_error for estimate in estimates]) / spread < 2


def test_fid_infinity_knows_which_pictures_are_of_one_prompt():
    values, apart, together = [], [], []
    reference, prompts = _population(np.ones(2)), np.repeat(range(25), 4)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(25, 2))[prompts] + 0.3 * rng.normal(size=(100, 2)) + 1
        found = fid_infinity(rows, reference, groups=prompts.tolist())
        values.append(found.value)
        together.append(found.standard_error)
        apart.append(fid_infinity(rows, reference).standard_error)
        assert found.freedom == 24
    assert np.median(together) / np.std(values) == pytest.approx(1, abs=0.2)
    assert np.median(apart) < 0.8 * np.std(values)
    assert not fid_infinity(rows, reference, groups=[0] * 100).known


def test_fid_infinity_is_seeded_and_takes_a_reference_as_features_or_moments():
    a, b = _features(1, 200), _features(2, 150)
    first = fid_infinity(a, b, seed=3)
    assert first == fid_infinity(a, Moments.of(b), seed=3) != fid_infinity(a, b, seed=4)
    assert first.value < _fid(a, b)


def test_fid_infinity_of_too_few_pictures_is_refused_with_the_number_it_needs():
    with pytest.raises(UserError, match="at least 72"):
        fid_infinity(_features(1, 71), _features(2, 100))
    fid_infinity(_features(1, 72), _features(2, 100))


def test_few_samples_warn():
    assert small_sample_warning(64, 64, 100) is None
    assert "mostly small-sample bias" in (small_sample_warning(64, 100, 63) or "")


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        _fid(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        Moments(3).update(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="expected"):
        Moments(3).update(np.zeros((2, 4)))
    with pytest.raises(UserError, match="at least 2"):
        frechet_from_features(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="cannot merge"):
        Moments(3).merge(Moments(4))


def test_taking_in_many_features_copies_only_a_few_of_them_at_once():
    features = np.random.default_rng(0).random((60_000, 64), dtype=np.float32)
    tracemalloc.start()
    Moments.of(features)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes / 4
