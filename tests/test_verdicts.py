import pytest

from eval.scores import Change, Score, Value
from eval.verdicts import judge, warnings


def _score(title, before, after, half, better="more", p=None, **more):
    change = Change(after - before, after - before - half, after - before + half, p)
    values = {"base": Value(before), "finetuned": Value(after), **more}
    return Score(title, better, values, "", change)


def _alike(after=0.7, half=0.05, **more):
    return _score("DINO", 0.3, after, half, real=Value(0.75), **more)


def _text(after, half):
    return _score("CLIP-T", 30, after, half)


def test_a_gain_without_a_loss_is_kept_and_said_against_real_pictures():
    keep, said = judge({"dino": _alike(), "clip_t": _text(30.1, 0.5)})
    assert keep == "keep"
    assert "more like the subject (DINO 0.300 to 0.700, 89% of the way to real ones)" in said
    assert "about as well as before" in said


def test_as_like_as_real_pictures_is_not_more_than_all_of_the_way():
    _, said = judge({"dino": _alike(after=0.9)})
    assert "as like as real pictures" in said and "%" not in said


def test_less_alike_is_left_and_has_no_way_to_go():
    keep, said = judge({"dino": _alike(after=0.2)})
    assert keep == "leave" and "less like the subject (DINO 0.300 to 0.200)" in said


def test_a_change_that_the_test_does_not_confirm_is_unclear():
    keep, _ = judge({"dino": _alike(p=0.125)})
    assert keep == "unclear"


def test_what_is_not_known_is_not_called_the_same():
    _, said = judge({"dino": _alike(), "clip_t": _text(26, 6)})
    assert "whether they follow the prompts as well is not clear" in said


@pytest.mark.parametrize(("won", "expected"), [(0.7, "unclear"), (0.31, "leave")])
def test_a_sure_loss_of_the_prompts_weighs(won, expected):
    keep, said = judge({"dino": _alike(after=won), "clip_t": _text(20, 2)})
    assert keep == expected and "follow the prompts less well" in said


def test_a_class_that_became_the_subject_is_named_and_not_simply_kept():
    lost = _score("Class turned", 0.1, 0.4, 0.1, better="less")
    keep, said = judge({"dino": _alike(), "prior_preservation": lost})
    assert keep == "unclear" and "its class has become more like the subject" in said


def test_forgetting_everything_is_named():
    gone = Score("Forgetting", "less", {"finetuned": Value(1.0, 0.9, 1.1)}, "")
    keep, said = judge({"dino": _alike(), "forgetting": gone}, subject="the style")
    assert keep == "unclear" and "unrelated pictures changed" in said
    assert "more like the style" in said
    little = Score("Forgetting", "less", {"finetuned": Value(0.3, 0.2, 0.4)}, "")
    assert judge({"dino": _alike(), "forgetting": little})[0] == "keep"


def test_copies_are_left_and_suspected_ones_are_to_be_looked_at():
    assert judge({"dino": _alike()}, copies="yes")[0] == "leave"
    keep, said = judge({"dino": _alike()}, copies="maybe")
    assert keep == "unclear" and said.startswith("It may copy")


def test_one_prompt_is_counted_in_the_singular():
    assert "is only 1 prompt" in warnings(prompts=1, cut_prompts=0)[0]
    assert "are only 6 different prompts" in warnings(prompts=6, cut_prompts=0)[0]
