import itertools
import math

import numpy as np
import pytest

from eval.significance import (
    hint,
    holm,
    interval,
    paired,
    probability,
    share,
    sign_test,
    smallest_detectable,
)

RNG = np.random.default_rng(0)


def test_interval_of_many_independent_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    got = interval(values)
    half = 1.96 * values.std() / 20
    assert got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((got.mean - half, got.mean + half), abs=0.03)
    assert got == interval(values)


def test_interval_of_few_is_no_narrower_than_students():
    values = np.array([1.0, 2, 4, 4.5, 7, 8])
    half = 2.5705818 * values.std(ddof=1) / math.sqrt(6)  # t of 5 degrees of freedom
    got = interval(values)
    assert got.low <= values.mean() - half + 1e-6
    assert got.high >= values.mean() + half - 1e-6


def test_interval_reaches_further_to_the_side_of_the_long_tail():
    values = np.exp(RNG.normal(size=25))
    got = interval(values)
    assert got.high - got.mean > 1.1 * (got.mean - got.low)
    mirrored = interval(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-got.high, -got.low))


def test_interval_moves_and_scales_with_the_values():
    values = RNG.normal(size=20)
    got, moved = interval(values), interval(5 + 3 * values)
    assert (moved.low, moved.high) == pytest.approx((5 + 3 * got.low, 5 + 3 * got.high))


def test_repeats_of_a_prompt_add_no_certainty():
    values = RNG.normal(size=30)
    once, four = interval(values), interval(np.repeat(values, 4), np.repeat(np.arange(30), 4))
    assert (four.n, four.groups) == (120, 30)
    assert (four.low, four.high) == pytest.approx((once.low, once.high))


def test_every_prompt_counts_once_however_many_pictures_it_has():
    got = interval(np.array([0.0, 0, 0, 0, 6, 3]), ["a", "a", "a", "a", "b", "c"])
    assert (got.mean, got.n, got.groups) == (3.0, 6, 3)


def test_what_cannot_be_known_has_no_interval_and_what_does_not_vary_has_no_width():
    alone = interval(np.array([1.0, 3]), [7, 7])
    assert (alone.mean, alone.low, alone.high, alone.groups) == (2.0, None, None, 1)
    same = interval(np.full(9, 0.25))
    assert (same.low, same.mean, same.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf], [[1.0, 2]]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="values"):
        interval(np.array(values))


def test_groups_and_pairs_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="groups"):
        interval(np.zeros(3), [1, 2])
    with pytest.raises(ValueError, match="paired"):
        paired(np.zeros(3), np.zeros(4))


def test_equal_inputs_differ_by_nothing():
    values = RNG.normal(size=40)
    for groups in (None, np.arange(40) // 4, np.zeros(40)):
        got = paired(values, values, groups)
        assert (got.difference, got.p, got.effect) == (0.0, 1.0, 0.0)
    assert (paired(values, values).low, paired(values, values).high) == (0.0, 0.0)


def test_p_is_the_share_of_all_sign_flips_that_reach_as_far():
    differences = np.array([1.0, -0.5, 2, 0.25, 3, 0, -0.25, 1.5])
    reached = [
        abs(np.dot(signs, differences)) >= abs(differences.sum()) - 1e-9
        for signs in itertools.product([-1, 1], repeat=8)
    ]
    assert paired(np.zeros(8), differences).p == pytest.approx(np.mean(reached), abs=1e-12)


def test_p_of_many_prompts_is_near_the_exact_one_and_never_0():
    differences = np.random.default_rng(3).normal(0.5, 1, size=15)
    drawn = paired(np.zeros(15), differences).p
    flips = np.array(list(itertools.product([-1, 1], repeat=15)))
    exact = (np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert paired(np.zeros(60), np.full(60, 1.0)).p == pytest.approx(1 / 10_001)


def test_the_other_way_round_everything_has_the_other_sign():
    first, second = RNG.normal(size=(2, 24))
    groups = np.arange(24) // 2
    one, other = paired(first, second, groups), paired(second, first, groups)
    assert other.difference == pytest.approx(-one.difference)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low))
    assert (other.p, other.effect) == (one.p, pytest.approx(-one.effect))


def test_the_order_of_the_pictures_means_nothing():
    first, second, groups = RNG.normal(size=30), RNG.normal(size=30), np.arange(30) // 3
    order = RNG.permutation(30)
    one, other = paired(first, second, groups), paired(first[order], second[order], groups[order])
    assert (other.low, other.high, other.p) == pytest.approx((one.low, one.high, one.p))


def test_what_all_prompts_share_cancels():
    noise, hard = RNG.normal(size=(2, 20)), 50 * RNG.normal(size=20)
    assert paired(noise[0] + hard, noise[1] + hard).p == paired(noise[0], noise[1]).p


def test_effect_is_in_standard_deviations_between_prompts():
    differences = np.array([1.0, 2, 3, 4])
    got = paired(np.zeros(8), np.repeat(differences, 2), np.repeat(np.arange(4), 2))
    assert got.effect == pytest.approx(2.5 / math.sqrt(5 / 3))
    assert paired(np.zeros(3), np.ones(3)).effect is None  # no spread to measure it in


def test_one_prompt_tells_nothing_of_others():
    got = paired(np.zeros(4), np.ones(4), np.zeros(4))
    assert (got.difference, got.low, got.high, got.p) == (1.0, None, None, 1.0)


def test_holm_raises_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_sign_test_is_the_binomial_one():
    assert sign_test(np.array([1.0, 2, 3, -1])) == pytest.approx(2 * (4 + 1) / 16)
    assert sign_test(np.array([5.0, 5, 5, 5, 5, 5, 0])) == pytest.approx(2 / 64)
    assert sign_test(np.zeros(4)) == 1.0
    assert sign_test(np.array([1.0, -1])) == 1.0


def test_a_share_stays_between_0_and_1_and_has_a_width_where_all_agree():
    all_of_them = share(np.ones(40))
    assert all_of_them.mean == all_of_them.high == 1.0
    assert all_of_them.low == pytest.approx(40 / (40 + 1.959964**2))  # Wilson's
    assert share(np.zeros(40)).high == pytest.approx(1 - all_of_them.low)
    with pytest.raises(ValueError, match="between 0 and 1"):
        share(np.array([0.5, 2]))


def test_a_share_is_surer_of_prompts_whose_pictures_disagree_among_themselves():
    groups = np.repeat(np.arange(20), 4)
    within, between = np.tile([1.0, 0, 1, 0], 20), (np.arange(80) // 4) % 2.0
    widths = [(found := share(v, groups)).high - found.low for v in (within, between)]
    assert widths[0] == pytest.approx(share(np.tile([1.0, 0], 40)).high * 2 - 1)
    assert widths[1] > 1.7 * widths[0]


def test_visible_differences_halve_with_four_times_the_prompts():
    differences = RNG.normal(size=40)
    least = smallest_detectable(differences)
    assert least / smallest_detectable(np.tile(differences, 4)) == pytest.approx(2, rel=0.05)
    normal = (1.959964 + 0.841621) * differences.std(ddof=1) / math.sqrt(40)
    assert normal < least < 1.06 * normal
    assert smallest_detectable(differences, power=0.9) > least


def test_the_hint_is_one_sentence_with_the_numbers():
    differences = np.repeat([3.0, -3], 20)
    said = hint(differences)
    assert said.startswith("With 40 prompts you can see differences of about 1.3")
    assert said.endswith("160 prompts would show half of that.")
    assert "subjects" in hint(differences, what="subjects")


def test_too_few_prompts_for_any_p_are_told():
    assert math.isinf(smallest_detectable(RNG.normal(size=5)))
    assert "With 5 prompts no difference" in hint(RNG.normal(size=5))
    assert "With 1 prompt no" in hint(RNG.normal(size=5), np.zeros(5))
    assert paired(np.zeros(5), np.ones(5)).p > 0.05 > paired(np.zeros(6), np.ones(6)).p


def test_small_probabilities_are_not_written_as_0():
    assert [probability(p) for p in (0.00001, 0.0123, 0.25)] == ["< 0.001", "0.012", "0.25"]
    assert probability(0.5, equals=True) == "p = 0.50"
