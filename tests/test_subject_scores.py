import numpy as np
import pytest

from eval import subject_scores
from eval.prompt_scores import label, of_pictures


def _views(count: int, centre: int, seed: int, d: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, d)) * 0.3 + 3 * np.eye(d)[centre]


def _arms() -> dict[str, np.ndarray]:
    return {"base_class": _views(40, 1, 0), "base": _views(40, 2, 1), "finetuned": _views(40, 0, 2)}


GROUPS = [k // 4 for k in range(40)]


def test_a_learned_subject_is_like_its_views_and_has_its_baselines():
    score, cosines = subject_scores.alike(
        _arms(),
        GROUPS,
        held_out=_views(6, 0, 3),
        training=_views(5, 0, 4),
        title="DINO",
        against="base_class",
    )
    assert score.improved == 1 and not score.warning
    assert score.values["real"].value == pytest.approx(score.values["training"].value, abs=0.1)
    assert score.values["finetuned"].value == pytest.approx(cosines["finetuned"].mean())
    moved = cosines["finetuned"].mean() - cosines["base_class"].mean()
    assert score.change.value == pytest.approx(moved)


def test_without_held_out_views_copies_score_best_and_that_is_said():
    training = _views(5, 0, 4)
    score, _ = subject_scores.alike(
        _arms(),
        GROUPS,
        held_out=np.empty((0, 16)),
        training=training,
        title="CLIP-I",
        against="base",
    )
    assert "copying" in score.warning
    assert score.values["training"].value > score.values["real"].value


def test_diversity_is_of_the_pictures_of_one_prompt():
    same = np.repeat(_views(10, 0, 0), 4, axis=0)
    arms = {"base": _views(40, 0, 1), "finetuned": same}
    score = subject_scores.varied(arms, GROUPS, against="base")
    assert score.values["finetuned"].value == pytest.approx(0, abs=1e-12)
    assert score.change.high < 0
    assert subject_scores.varied(arms, list(range(40)), against="base") is None


def test_forgetting_is_in_units_of_another_seed():
    base, other = _views(24, 0, 0), _views(24, 0, 1)
    score, distances = subject_scores.forgotten(base, other, other)
    assert score.values["finetuned"].value == pytest.approx(1, rel=0.2)
    still, none = subject_scores.forgotten(base, base, other)
    assert still.values["finetuned"].value == pytest.approx(0, abs=1e-9)
    assert max(none) == pytest.approx(0, abs=1e-9) and min(distances) > 0


def test_a_score_of_one_prompt_has_a_value_and_no_change():
    score = of_pictures(
        {"base": np.zeros(3), "finetuned": np.ones(3)}, [0, 0, 0], title="x", better="more", how=""
    )
    assert score.change is None and score.values["finetuned"].low is None
    assert score.improved == 0


def test_prompts_are_labelled_by_their_text():
    assert label(["a", "b", "a"]) == [0, 1, 0]
