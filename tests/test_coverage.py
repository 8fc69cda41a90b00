import tracemalloc

import numpy as np
import pytest

from eval import coverage as module
from eval.coverage import Coverage, coverage
from train.config import UserError


def _features(seed: int, n: int, d: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def _by_hand(real: np.ndarray, generated: np.ndarray, k: int) -> Coverage:
    def apart(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    radii = [np.sort(apart(x, x), axis=1)[:, k] for x in (real, generated)]  # 0 is itself
    across = apart(real, generated)
    inside = across < radii[0][:, None]
    return Coverage(
        precision=float((across <= radii[0][:, None]).any(axis=0).mean()),
        recall=float((across <= radii[1][None]).any(axis=1).mean()),
        density=float(inside.sum() / (k * len(generated))),
        coverage=float(inside.any(axis=1).mean()),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1 << 22, 100])
def test_all_four_are_their_definitions_in_blocks_of_any_size(monkeypatch, k, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    real, generated = _features(1, 40), 0.7 * _features(2, 55) + 0.5
    found = coverage(real, generated, neighbours=k)
    assert found == pytest.approx(_by_hand(real, generated, k))
    assert 0 < found.recall < found.precision < 1  # narrower than the real ones


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_identical_sets_have_all_and_disjoint_ones_nothing(offset):
    real = _features(1, 60) + offset
    assert coverage(real, real.copy()) == (1, 1, 1, 1)
    assert coverage(real, real[::-1]) == (1, 1, 1, 1)
    assert coverage(real, real + 100) == (0, 0, 0, 0)


def test_swapped_inputs_swap_precision_and_recall():
    a, b = _features(1, 50), 0.6 * _features(2, 70)
    precision, recall = coverage(a, b)[:2]
    assert coverage(b, a)[:2] == (recall, precision) != (precision, recall)


def test_rotation_translation_and_scale_leave_them():
    a, b = _features(1, 50), 0.6 * _features(2, 70)
    rotation = np.linalg.qr(_features(3, 5))[0]
    assert coverage(3 * a @ rotation + 50, 3 * b @ rotation + 50) == coverage(a, b)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    modes = [_features(seed, 40) + 50 * seed for seed in (1, 2)]
    both = np.concatenate(modes)
    assert coverage(both, _features(3, 40) + 50).recall == pytest.approx(0.5, abs=0.1)
    assert coverage(modes[0], both)[:2] == (pytest.approx(0.5), 1.0)
    outlier = np.concatenate([modes[0], np.full((1, 5), 300.0)])  # its ball holds the other mode
    between = modes[1]
    assert coverage(outlier, between).precision == 1.0
    assert coverage(outlier, between).density < 0.5


def test_copies_of_one_picture_are_within_each_other():
    same = np.ones((10, 3))
    assert coverage(same, same)[:2] == (1, 1)


def test_too_few_pictures_are_refused():
    with pytest.raises(UserError, match="more than 3 pictures, there are 3 generated"):
        coverage(_features(1, 10), _features(2, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(value):
    broken = _features(2, 10)
    broken[3, 2] = value
    for pair in ((_features(1, 10), broken), (broken, _features(1, 10))):
        with pytest.raises(ValueError, match="NaN or infinity"):
            coverage(*pair)


def test_no_matrix_of_all_pairs_is_held(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1 << 18)
    a, b = _features(1, 3000), _features(2, 3000)
    tracemalloc.start()
    coverage(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 3000 * 8 / 3
