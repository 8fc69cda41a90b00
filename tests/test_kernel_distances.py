import tracemalloc

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from eval import kernel_distances
from eval.clip_score import unit
from eval.kernel_distances import cmmd, cmmd_change, cmmd_estimate, kid, kid_change, kid_subsets
from train.config import UserError


def _features(seed: int, n: int, d: int = 8, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def _pairs(a: np.ndarray, b: np.ndarray, kernel) -> np.ndarray:
    return np.array([[kernel(x, y) for y in b] for x in a])


def _by_hand(a: np.ndarray, b: np.ndarray, kernel) -> tuple[float, float]:
    """Biased and unbiased, from the definition."""
    aa, bb, ab = _pairs(a, a, kernel), _pairs(b, b, kernel), _pairs(a, b, kernel)
    n, m = len(a), len(b)
    others = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    biased = aa.sum() / n**2 + bb.sum() / m**2 - 2 * ab.mean()
    return biased, sum(others) - 2 * ab.mean()


def test_kid_and_cmmd_are_their_definitions():
    a, b = _features(1, 9), _features(2, 7, shift=0.5)
    _, expected = _by_hand(a, b, lambda x, y: (x @ y / 8 + 1) ** 3)
    assert kid(a, b).value == pytest.approx(expected, rel=1e-12)
    gaussian = _by_hand(unit(a), unit(b), lambda x, y: 1000 * np.exp(-((x - y) ** 2).sum() / 200))
    assert cmmd(a, b) == pytest.approx(gaussian, rel=1e-9)
    assert cmmd_estimate(a, b).value == cmmd(a, b).unbiased


def test_blocks_change_nothing(monkeypatch):
    a, b = _features(1, 50), _features(2, 30)
    whole, grouped = kid(a, b), kid(a, b, groups=[k // 2 for k in range(50)])
    monkeypatch.setattr(kernel_distances, "_BLOCK", 200)
    assert kid(a, b) == pytest.approx(whole, rel=1e-11)
    assert kid(a, b, groups=[k // 2 for k in range(50)]) == pytest.approx(grouped, rel=1e-11)


def test_agrees_with_torchmetrics_on_equal_subsets(monkeypatch):
    class Identity(torch.nn.Module):
        num_features = 8

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    a, b = _features(1, 60), _features(2, 50, shift=0.3)
    metric = KernelInceptionDistance(feature=Identity(), subsets=7, subset_size=20)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    rng = np.random.default_rng(11)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.from_numpy(rng.permutation(n)))
    expected = [float(value) for value in metric.compute()]
    assert kid_subsets(a, b, subset_size=20, subsets=7, seed=11) == pytest.approx(expected)
    same_size = float(poly_mmd(torch.from_numpy(a[:50]), torch.from_numpy(b)))
    assert kid(a[:50], b).value == pytest.approx(same_size, rel=1e-6)


def test_subsets_scatter_around_the_value_of_all_pairs():
    a, b = _features(1, 120), _features(2, 100, shift=0.3)
    mean, deviation = kid_subsets(a, b, subset_size=50, subsets=60)
    assert abs(mean - kid(a, b).value) < 4 * deviation / np.sqrt(60)
    assert kid_subsets(a, b, subsets=2)[0] == pytest.approx(
        kid_subsets(a, b, subset_size=100, subsets=2)[0]
    )


def test_equal_distributions_have_a_kid_and_an_unbiased_cmmd_about_zero():
    draws = [(_features(2 * k, 40), _features(2 * k + 1, 60)) for k in range(120)]
    for values in ([kid(a, b).value for a, b in draws], [cmmd(a, b)[1] for a, b in draws]):
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
        assert min(values) < 0 < max(values)
    biased = [cmmd(a, b).biased for a, b in draws]
    assert min(biased) > 0


@pytest.mark.parametrize("distance", [kid, cmmd_estimate])
@pytest.mark.parametrize("shift", [0.0, 0.1, 0.4])
def test_the_standard_error_is_the_spread_of_repeated_draws(distance, shift):
    draws = range(250)
    found = [distance(_features(2 * k, 40, 8, shift), _features(2 * k + 1, 60)) for k in draws]
    values = np.array([estimate.value for estimate in found])
    truth = values.mean()
    error = np.sqrt(np.mean([estimate.standard_error**2 for estimate in found]))
    assert 0.93 < error / values.std() < 1.5
    held = np.mean([estimate.low < truth < estimate.high for estimate in found])
    assert held > 0.92


def test_the_standard_error_is_that_of_the_means_over_rows():
    a, b = _features(1, 9), _features(2, 6, shift=0.5)
    kernel = [_pairs(x, y, lambda x, y: (x @ y / 8 + 1) ** 3) for x, y in ((a, a), (b, b), (a, b))]
    others = [(k.sum(axis=1) - np.diag(k)) / (len(k) - 1) for k in kernel[:2]]
    rows = others[0] - kernel[2].mean(axis=1), others[1] - kernel[2].mean(axis=0)
    expected = 4 * rows[0].var(ddof=1) / 9 + 4 * rows[1].var(ddof=1) / 6
    assert kid(a, b).standard_error == pytest.approx(np.sqrt(expected))


def test_the_error_knows_which_rows_depend_on_each_other():
    values, apart, together = [], [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        a = np.repeat(rng.normal(size=(15, 4)) + 0.4, 4, axis=0) + 0.1 * rng.normal(size=(60, 4))
        b = rng.normal(size=(50, 4))
        values.append(kid(a, b).value)
        apart.append(kid(a, b).standard_error)
        together.append(kid(a, b, groups=np.repeat(range(15), 4)).standard_error)
    assert np.mean(together) / np.std(values) == pytest.approx(1, abs=0.2)
    assert np.mean(apart) < 0.75 * np.std(values)


def test_rows_of_both_sets_with_one_label_are_known_to_move_together():
    values, apart, together = [], [], []
    for seed in range(150):
        a = _features(seed, 40, shift=0.5)
        b = 0.8 * (a - 0.5) + 0.6 * _features(10**6 + seed, 40)
        values.append(kid(a, b).value)
        apart.append(kid(a, b).standard_error)
        together.append(kid(a, b, groups=range(40), groups_of_b=range(40)).standard_error)
    assert np.mean(together) / np.std(values) == pytest.approx(1, abs=0.25)
    assert np.mean(together) < 0.9 * np.mean(apart)


def test_without_labels_rows_are_independent():
    a, b = _features(1, 20, shift=0.4), _features(2, 20)
    alone = kid(a, b).standard_error
    assert kid(a, b, groups=range(20)).standard_error == pytest.approx(alone)
    assert kid(a, b, groups_of_b=range(20)).standard_error == pytest.approx(alone)
    assert np.isnan(kid(a, b, groups=[0] * 20).standard_error)
    with pytest.raises(ValueError, match="labels"):
        kid(a, b, groups=[0, 1])


def test_the_interval_is_students_of_the_fewer_labels():
    a, b = _features(1, 20, shift=0.4), _features(2, 12)
    found = kid(a, b, groups=[k // 5 for k in range(20)])  # 4 prompts: t of 3 is 3.182
    assert found.freedom == 3 and kid(a, b).freedom == 11
    assert found.high - found.value == pytest.approx(3.1824 * found.standard_error, rel=1e-3)


@pytest.mark.parametrize("change", [kid_change, cmmd_change])
def test_a_change_is_surer_than_its_two_distances(change):
    found = []
    for seed in range(150):
        before, reference = _features(2 * seed, 40, shift=0.5), _features(2 * seed + 1, 60)
        after = before - 0.1 + 0.1 * _features(10**6 + seed, 40)
        found.append(change(before, after, reference))
    values = np.array([estimate.value for estimate in found])
    error = np.sqrt(np.mean([estimate.standard_error**2 for estimate in found]))
    assert 0.9 < error / values.std() < 1.4
    held = [estimate.low < values.mean() < estimate.high for estimate in found]
    assert np.mean(held) > 0.9
    distance = kid if change is kid_change else cmmd_estimate
    assert error < 0.6 * distance(before, reference).standard_error
    assert values[-1] == pytest.approx(
        distance(after, reference).value - distance(before, reference).value
    )
    assert change(before, before, reference)[:2] == (0, 0)
    assert change(before, before, reference).freedom == 39


def test_cmmd_of_one_point_sets_is_the_closed_form():
    x, y = unit(_features(1, 2))
    expected = 2000 * (1 - np.exp(-((x - y) ** 2).sum() / 200))
    for scale in (1.0, 7.0):  # embeddings are taken at length one
        found = cmmd(scale * np.tile(x, (3, 1)), np.tile(y, (5, 1)))
        assert found == pytest.approx((expected, expected), rel=1e-12)
    close = cmmd(np.tile(x, (2, 1)), np.tile(unit((x + 1e-4 * y)[None]), (2, 1)))
    assert close.biased > 0


def test_too_few_pictures_and_unlike_dimensions_are_refused():
    with pytest.raises(UserError, match="at least 2"):
        kid(_features(1, 1), _features(2, 5))
    with pytest.raises(UserError, match="at least 2"):
        cmmd(_features(1, 5), _features(2, 1))
    with pytest.raises(ValueError, match="expected"):
        kid(_features(1, 5), _features(2, 5, d=9))
    broken = _features(1, 5)
    broken[2, 3] = np.nan
    for pair in ((broken, _features(2, 5)), (_features(2, 5), broken)):
        with pytest.raises(ValueError, match="NaN"):
            kid(*pair)


def test_no_matrix_of_all_pairs_is_held():
    a, b = _features(1, 6000), _features(2, 5000)
    tracemalloc.start()
    kid(a, b)
    cmmd(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 5000 * 8 / 3
