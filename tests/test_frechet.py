import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from eval.frechet import (
    Moments,
    bootstrap,
    expected_bias,
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


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3], [17, 50], [0, 99]])
def test_any_split_equals_one_pass_even_far_from_zero(cuts):
    features = _features(1, 100) + 1e4
    whole, parts = Moments.of(features), [Moments.of(p) for p in np.split(features, cuts)]
    total = Moments(12)
    for part in parts:
        total.merge(part)
    assert total.n == 100
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(total.cov, np.cov(features - 1e4, rowvar=False), rtol=1e-9)


def test_a_large_offset_costs_no_digits():
    a, b = _features(1, 200), _features(2, 200)
    assert _fid(a + 1e4, b + 1e4) == pytest.approx(_fid(a, b), rel=1e-9)


def test_both_routes_agree_where_samples_are_fewer_than_dimensions():
    a, b = _features(1, 20, d=40), _features(2, 30, d=40)
    assert frechet_from_features(a, b) == pytest.approx(_fid(a, b), rel=1e-6)


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


def test_bootstrap_is_seeded_paired_and_keeps_groups_together():
    reference, a = _features(1, 60, d=4), _features(2, 40, d=4)
    first = bootstrap(reference, a, a, resamples=5, seed=3)
    assert (first[:, 0] == first[:, 1]).all()
    assert (first == bootstrap(reference, a, a, resamples=5, seed=3)).all()
    tied = bootstrap(a, a, groups=range(40), reference_groups=range(40), resamples=5)
    assert tied == pytest.approx(0, abs=1e-5)
    pairs = np.repeat(a, 2, axis=0)
    together = bootstrap(reference, pairs, groups=[k // 2 for k in range(80)], resamples=60)
    apart = bootstrap(reference, pairs, resamples=60)
    assert together.std() > apart.std()


def test_few_samples_warn():
    assert small_sample_warning(64, 64, 100) is None
    assert "mostly small-sample bias" in (small_sample_warning(64, 100, 63) or "")


def test_saved_moments_come_back_with_their_metadata(tmp_path):
    moments = Moments.of(_features(1, 50))
    moments.save(tmp_path / "m.safetensors", {"extractor": "clip", "resize": "clean"})
    loaded, metadata = Moments.load(tmp_path / "m.safetensors")
    assert loaded.n == 50 and metadata == {"extractor": "clip", "resize": "clean"}
    assert (loaded.mean == moments.mean).all() and (loaded.m2 == moments.m2).all()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        _fid(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="NaN"):
        Moments(3).update(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="expected"):
        Moments(3).update(np.zeros((2, 4)))
