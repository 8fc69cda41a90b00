import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.inception import InceptionScore

from eval.variety import inception_score, vendi_score
from train.config import UserError


def _probabilities(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    logits = 2 * np.random.default_rng(seed).normal(size=(n, k))
    exponentials = np.exp(logits)
    return logits, exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [2, 10])
def test_unsure_or_equal_pictures_score_1_and_one_of_each_class_scores_their_number(k):
    assert inception_score(np.full((7, k), 1 / k)) == pytest.approx(1, abs=1e-12)
    assert inception_score(np.tile(np.eye(k)[0], (7, 1))) == pytest.approx(1, abs=1e-12)
    assert inception_score(np.tile(np.eye(k), (3, 1))) == pytest.approx(k, rel=1e-12)


def test_inception_score_agrees_with_torchmetrics():
    class Identity(torch.nn.Module):
        num_features = 10

        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    logits, probabilities = _probabilities(1, 80, 10)
    metric = InceptionScore(feature=Identity(), splits=1).set_dtype(torch.float64)
    metric.update(torch.from_numpy(logits))
    assert inception_score(probabilities) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_splits_are_scored_apart_and_averaged():
    _, probabilities = _probabilities(1, 30, 5)
    parts = [inception_score(part) for part in (probabilities[:15], probabilities[15:])]
    assert inception_score(probabilities, splits=2) == pytest.approx(np.mean(parts))
    with pytest.raises(UserError, match="splits=31"):
        inception_score(probabilities, splits=31)
    negative, unknown = np.array([[1.5, -0.5], [0.5, 0.5]]), np.array([[np.nan, 1.0]])
    for wrong in (2 * probabilities, negative, unknown):
        with pytest.raises(ValueError, match="sum to 1"):
            inception_score(wrong)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), repeats=st.integers(1, 9), scale=st.floats(0.1, 100))
def test_n_orthogonal_pictures_amount_to_n_however_often_each_is_there(n, repeats, scale):
    basis = np.linalg.qr(np.random.default_rng(n).normal(size=(12, 12)))[0][:n]
    assert vendi_score(np.tile(scale * basis, (repeats, 1))) == pytest.approx(n, rel=1e-9)


def test_one_picture_many_times_amounts_to_1():
    assert vendi_score(np.tile([3.0, 4.0], (50, 1))) == pytest.approx(1, rel=1e-9)
    assert vendi_score(np.array([[3.0, 4.0]])) == pytest.approx(1)
    with pytest.raises(UserError, match="no pictures"):
        vendi_score(np.empty((0, 2)))


@pytest.mark.parametrize("n", [5, 40])
def test_vendi_is_its_definition_by_either_gram_matrix(n):
    features = np.random.default_rng(0).normal(size=(n, 12))
    rows = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(rows @ rows.T / n)
    values = values[values > 1e-12]
    assert vendi_score(features) == pytest.approx(np.exp(-(values * np.log(values)).sum()))
    assert 1 < vendi_score(features) < min(n, 12)
