import numpy as np
import pytest

from eval.distance_scores import scores
from eval.frechet import frechet_from_features
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
    found = scores(reference, arms, groups=range(n), of_reference=range(n), extractor=DESCRIBED)
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
