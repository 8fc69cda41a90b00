import numpy as np
import pytest

from eval.distance_scores import Features, scores
from eval.frechet import frechet_from_features
from eval.kernel_distances import cmmd
from eval.prompt_scores import clip_score
from eval.verdicts import judge, warnings

DESCRIBED = {"name": "toy", "sha256": "0", "resize": "clean", "dimension": 8}


def _world(shift: float, follow: float, n: int = 160, d: int = 8):
    """Where the base is 3 away from the reference, the fine-tuned `shift`."""
    rng = np.random.default_rng(0)
    texts, noise = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    arms = {
        "base": noise + texts + np.eye(d)[0] * 3,
        "finetuned": noise + follow * texts + np.eye(d)[0] * shift,
    }
    reference = rng.normal(size=(n, d)) + rng.normal(size=(n, d))
    found = scores(
        reference,
        arms,
        groups=range(n),
        of_reference=range(n),
        extractor=DESCRIBED,
        clip=Features(reference, arms, DESCRIBED),
    )
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    cosines = {arm: (unit(rows) * unit(texts)).sum(1) for arm, rows in arms.items()}
    return found | {"clip_score": clip_score(cosines, list(range(n)))}, reference, arms


def test_the_fid_is_that_of_the_features_and_lies_in_its_interval():
    found, reference, arms = _world(shift=0.5, follow=1.0)
    for arm, rows in arms.items():
        value = found["fid"].values[arm]
        assert value.value == pytest.approx(frechet_from_features(rows, reference), rel=1e-9)
        assert value.low < value.value < value.high
    change = found["fid"].change
    expected = found["fid"].values["finetuned"].value - found["fid"].values["base"].value
    assert change.value == pytest.approx(expected)


def test_all_distances_see_which_is_closer():
    found, _, _ = _world(shift=0.0, follow=1.0)
    for name in ("fid", "kid", "cmmd"):
        assert found[name].improved == 1, name
    worse, _, _ = _world(shift=6.0, follow=1.0)
    for name in ("fid", "kid", "cmmd"):
        assert worse[name].improved == -1, name


def test_with_fewer_pictures_than_dimensions_the_unbiased_distances_lead():
    assert next(iter(_world(0.0, 1.0, n=160)[0])) == "fid"
    few, _, _ = _world(0.0, 1.0, n=6)
    assert next(iter(few)) == "kid"
    assert "mostly small-sample bias" in few["fid"].warning
    assert "precision" not in few


def test_verdicts_say_what_the_numbers_do():
    keep, said = judge(_world(shift=0.0, follow=1.0)[0], copies="no")
    assert keep == "keep" and said.startswith("Fine-tuning brought the pictures closer")
    keep, said = judge(_world(shift=0.0, follow=0.2)[0], copies="no")
    assert keep == "unclear" and "but they follow the prompts less well" in said
    keep, said = judge(_world(shift=3.0, follow=1.0)[0], copies="no")
    assert keep == "unclear" and "did not clearly change" in said
    keep, said = judge(_world(shift=6.0, follow=0.0)[0], copies="no")
    assert keep == "leave" and "and they follow the prompts less well" in said


def test_a_copying_model_is_not_to_be_kept_however_close_it_is():
    keep, said = judge(_world(shift=0.0, follow=1.0)[0], copies="yes")
    assert keep == "leave" and said.startswith("It copies")


def test_few_prompts_and_cut_ones_are_warned_of():
    found = " ".join(warnings(prompts=6, cut_prompts=2))
    assert "only 6 different prompts" in found and "2 prompts are longer" in found
    assert not warnings(prompts=50, cut_prompts=0)


def test_one_set_alone_has_values_and_no_change():
    rng = np.random.default_rng(1)
    found = scores(
        rng.normal(size=(40, 4)),
        {"finetuned": rng.normal(size=(50, 4))},
        groups=range(50),
        of_reference=range(50, 90),
        extractor=DESCRIBED,
    )
    assert all(score.change is None for score in found.values())
    assert abs(found["kid"].values["finetuned"].value) < 0.5


def _equal(prompts: int, pictures: int, d: int = 4, seed: int = 0, **more):
    """Base and fine-tuned model of one distribution, 1 away from the reference."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(range(prompts), pictures)
    rows = [rng.normal(size=(prompts * pictures, d)) + shift for shift in (0, 1, 1)]
    return scores(
        rows[0],
        {"base": rows[1], "finetuned": rows[2]},
        groups=groups.tolist(),
        of_reference=groups.tolist(),
        extractor=DESCRIBED,
        clip=Features(rows[0] + 3, {"base": rows[1] + 3, "finetuned": rows[2] + 3}, DESCRIBED),
        **more,
    )


def test_of_one_prompt_nothing_is_sure():
    for seed in range(3):
        for name, score in _equal(1, 16, seed=seed).items():
            assert score.change is None and score.improved == 0, name
            assert all(v.low is None and v.high is None for v in score.values.values()), name


def test_below_6_prompts_there_are_wide_intervals_and_no_change_and_that_is_said():
    few, enough = _equal(5, 4), _equal(6, 4)
    for name in ("fid", "kid", "cmmd"):
        assert few[name].change is None and enough[name].change is not None
        assert "cannot be told from 5 different prompts: use at least 6" in few[name].warning
        assert "cannot be told" not in enough[name].warning
        assert few[name].values["base"].low < few[name].values["base"].value


def test_cmmd_is_of_what_a_clip_sees_and_left_out_without_one():
    rng = np.random.default_rng(0)
    arms = {"finetuned": rng.normal(size=(20, 8))}
    seen = Features(
        rng.normal(size=(12, 5)), {"finetuned": rng.normal(size=(20, 5))}, {"name": "C"}
    )
    labels = {"groups": range(20), "of_reference": range(20, 32), "extractor": DESCRIBED}
    found = scores(rng.normal(size=(12, 8)), arms, clip=seen, **labels)
    expected = cmmd(seen.arms["finetuned"], seen.reference)
    assert found["cmmd"].values["finetuned"].value == pytest.approx(expected.unbiased)
    assert found["cmmd_biased"].values["finetuned"].value == pytest.approx(expected.biased)
    assert "5-dimensional features by C" in found["cmmd"].how
    assert "8-dimensional features by toy" in found["kid"].how
    without = scores(rng.normal(size=(12, 8)), arms, **labels)
    assert "kid" in without and not any(name.startswith("cmmd") for name in without)


@pytest.mark.parametrize(("pictures", "said"), [(60, "about "), (20, "at least about "), (8, None)])
def test_what_equal_sets_would_score_is_said_as_surely_as_it_is_known(pictures, said):
    score = _equal(pictures, 1, d=12)["fid"]
    if said is None:
        assert score.facts["bias_estimate"] is None and "would score" not in score.how
        assert "mostly small-sample bias" in score.warning
    else:
        assert f"would score {said}" in score.how and score.facts["bias_estimate"] > 0
