import numpy as np
import pytest

from eval import subject_scores
from eval.prompt_scores import label, of_pictures
from eval.subject import likeness, real_likeness


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


def test_diversity_says_of_how_many_pictures_and_prompts_it_is():
    arms = {"base": _views(21, 0, 1), "finetuned": _views(21, 0, 2)}
    groups = [k // 4 for k in range(20)] + [9]  # the last prompt has one picture
    score = subject_scores.varied(arms, groups, against="base")
    assert (score.facts["prompts"], score.facts["pictures"]) == (5, 20)
    assert score.values["base"].n == 20


def _deleted(statistic, *, count: int) -> float:
    """The textbook's jackknife error."""
    values = np.array([statistic([k for k in range(count) if k != j]) for j in range(count)])
    return np.sqrt((count - 1) * values.var())


@pytest.mark.parametrize("held_out", [True, False])
def test_real_pictures_and_copies_have_the_errors_of_leaving_pictures_out(held_out):
    real, training = _views(7, 0, 3), _views(5, 0, 4)
    score, _ = subject_scores.alike(
        _arms(),
        GROUPS,
        held_out=real if held_out else real[:0],
        training=training if held_out else real,
        title="DINO",
        against="base",
    )
    ceiling = _deleted(lambda kept: real_likeness(real[kept]).mean(), count=7)
    value = score.values["real"]
    assert value.high - value.value == pytest.approx(2.4469 * ceiling, rel=1e-3)  # t of 6
    copy = score.values["training"]
    if held_out:
        by_real = _deleted(lambda kept: likeness(training, real[kept]).mean(), count=7)
        by_training = _deleted(lambda kept: likeness(training[kept], real).mean(), count=5)
        expected = 2.7764 * np.hypot(by_real, by_training)  # t of 4
    else:  # each against all others and, always alike, itself
        expected = 6 / 7 * 2.4469 * ceiling
    assert copy.high - copy.value == pytest.approx(expected, rel=1e-3)
    assert copy.value == pytest.approx(likeness(training if held_out else real, real).mean())
    assert "jackknife over pictures" in score.interval


def test_two_real_pictures_have_a_likeness_and_no_interval():
    score, _ = subject_scores.alike(
        _arms(),
        GROUPS,
        held_out=_views(2, 0, 3),
        training=_views(1, 0, 4),
        title="x",
        against="base",
    )
    for arm in ("real", "training"):
        assert score.values[arm].low is None and score.values[arm].value > 0.5


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_where_seeds_change_nothing_the_distances_are_not_called_shares(noise):
    rng = np.random.default_rng(0)
    base, moved = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    score, distances = subject_scores.forgotten(base, moved, base + noise * rng.normal(size=(6, 5)))
    value = score.values["finetuned"]
    assert value.value == pytest.approx(np.mean(distances)) and value.low is None
    assert "as a share" not in score.how and "nothing to measure by" in score.warning


def test_forgetting_is_never_said_to_be_negative():
    base, other = _views(8, 0, 0), _views(8, 0, 1)
    base_but_one = np.concatenate([other[:1], base[1:]])
    value = subject_scores.forgotten(base, base_but_one, other)[0].values["finetuned"]
    assert value.low == 0 < value.value < value.high


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
