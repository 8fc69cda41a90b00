import numpy as np
import pytest

from eval.figures import number
from eval.scoring import nearest, score, verdict, warnings


def _world(shift: float, follow: float, n: int = 120, d: int = 8) -> dict:
    """Scores where the base is 3 away from the reference, the fine-tuned `shift`."""
    rng = np.random.default_rng(0)
    texts, noise = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    base = noise + texts + np.eye(d)[0] * 3
    finetuned = noise + follow * texts + np.eye(d)[0] * shift
    reference = rng.normal(size=(n, d)) + rng.normal(size=(n, d))
    prompts = [f"prompt {k}" for k in range(n)]
    return score(reference, base, finetuned, texts, prompts, prompts)[0]


def test_a_closer_model_is_said_to_be_closer():
    scores = _world(shift=0.0, follow=1.0)
    assert scores["fid"]["base"]["value"] > 9 > scores["fid"]["finetuned"]["value"]
    assert scores["fid"]["change"]["high"] < 0
    assert verdict(scores).startswith("Fine-tuning brought the pictures closer")
    assert f"FID {number(scores['fid']['base']['value'])} to" in verdict(scores)


def test_a_model_that_forgets_the_prompts_is_said_to():
    text = verdict(_world(shift=0.0, follow=0.2))
    assert "closer" in text and "but they follow the prompts less well" in text


def test_an_unchanged_model_is_not_praised():
    text = verdict(_world(shift=3.0, follow=1.0))
    assert "did not clearly change" in text and "about as well as before" in text


def test_a_worse_model_is_said_to_be_worse():
    text = verdict(_world(shift=6.0, follow=0.0))
    assert "further" in text and "and they follow the prompts less well" in text


def test_intervals_hold_the_value():
    scores = _world(shift=0.0, follow=1.0)
    for metric, key in (("fid", "value"), ("clip_score", "mean")):
        for row in ("base", "finetuned", "change"):
            entry = scores[metric][row]
            assert entry["low"] <= entry[key] <= entry["high"]


def test_cosines_are_raw_and_in_order():
    features = np.array([[1.0, 0], [0, 1], [-1, 0.1]])
    texts = np.array([[1.0, 0], [1, 0], [1, 0]])
    _, cosines = score(features, features, features * 2, texts, list("abc"), list("abc"))
    assert [before for before, _ in cosines] == pytest.approx([1, 0, -1], abs=0.01)
    assert cosines[2][0] == pytest.approx(cosines[2][1])


def test_too_few_pictures_are_warned_of():
    few = _world(shift=0.0, follow=1.0, n=6)
    text = " ".join(warnings(few, cut_prompts=2))
    assert "mostly small-sample bias" in text and "only 6 different prompts" in text
    assert "2 prompts are longer" in text
    assert not warnings(_world(shift=2.0, follow=1.0, n=400))


def test_nearest_goes_by_direction():
    found = nearest(np.array([[2.0, 0.1], [0, 1]]), np.array([[0.0, 9], [9, 0]]))
    assert [index for index, _ in found] == [1, 0]
    assert found[1][1] == pytest.approx(1)
