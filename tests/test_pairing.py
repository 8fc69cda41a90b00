"""data/pairing.py: which class picture stands beside which sample."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Order
from data.pairing import Doubled, Pairing, in_proportion, samples_per_bucket, share_out
from train.config import UserError

SIZES = [(64, 64), (48, 80), (80, 48)]


@st.composite
def worlds(draw):
    """Pictures of two sources in up to three buckets, and class pictures for every bucket."""
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=2, max_size=9))
    sources = np.array([0, 1, *draw(st.lists(st.integers(0, 1), min_size=9, max_size=9))])
    sizes, sources = np.array(sizes, np.int32), sources[: len(sizes)].astype(np.int32)
    classes = draw(st.sampled_from([[0, 0], [0, 1], [1, 0]]))
    groups = sorted({(classes[s], *size) for s, size in zip(sources, sizes.tolist(), strict=True)})
    counts = draw(st.lists(st.integers(1, 4), min_size=len(groups), max_size=len(groups)))
    beside = [group for group, count in zip(groups, counts, strict=True) for _ in range(count)]
    order = Order(
        sizes,
        seed=draw(st.integers(0, 9)),
        batch_size=draw(st.integers(1, 4)),
        sources=sources,
        weights=draw(st.sampled_from([None, (0.3, 0.7)])),
        repeats=(1, 3),
    )
    return order, sizes, sources, classes, np.array(beside, np.int32)


def pairing(world, seed=5) -> Pairing:
    order, sizes, sources, classes, beside = world
    return Pairing(
        order,
        seed=seed,
        sizes=sizes,
        sources=sources,
        classes=classes,
        class_sizes=beside[:, 1:],
        class_of=beside[:, 0],
    )


def steps_of(order: Order, epochs: int) -> int:
    return sum(order.batches_in(epoch) for epoch in range(epochs))


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_partners_are_of_the_same_class_and_bucket_and_all_used_alike(world):
    order, sizes, sources, classes, beside = world
    pairs = pairing(world)
    used: Counter = Counter()
    for step in range(steps_of(order, 7)):
        indices, _ = order.batch(step)
        partners, before = pairs.batch(step)
        for index, partner, times in zip(indices, partners, before, strict=True):
            assert beside[partner - len(sizes)].tolist() == [
                classes[sources[index]],
                *sizes[index],
            ]
            assert times == used[partner]
            used[partner] += 1
    for group in np.unique(beside, axis=0):
        members = len(sizes) + np.flatnonzero((beside == group).all(axis=1))
        times = [used[member] for member in members]
        assert max(times) - min(times) <= 1


@settings(max_examples=30, deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_a_step_does_not_depend_on_the_steps_before(world, random):
    pairs = pairing(world)
    steps = list(range(steps_of(world[0], 4)))
    there = {step: pairs.batch(step) for step in steps}
    random.shuffle(steps)
    again = pairing(world)
    for step in steps:
        assert np.array_equal(there[step], again.batch(step))


def test_another_seed_pairs_otherwise():
    sizes = np.array([(64, 64)] * 4, np.int32)
    order = Order(sizes, seed=0, batch_size=2)
    zeros = np.zeros(4, np.int32)
    world = order, sizes, zeros, [0], np.array([(0, 64, 64)] * 20, np.int32)
    one, other = ([pairing(world, seed).batch(step) for step in range(10)] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_a_sample_beside_itself_is_the_same_picture_further_on():
    order = Order(np.array([(64, 64)] * 5, np.int32), seed=0, batch_size=2)
    for step in range(9):
        indices, repeats = order.batch(step)
        partners, before = Doubled(order, 5).batch(step)
        assert np.array_equal(partners, indices + 5) and np.array_equal(before, repeats)


# Which bucket a class picture is brought to


def distortion(widths, heights, sizes) -> float:
    return float(np.abs(np.log(widths / heights) - np.log(sizes[:, 0] / sizes[:, 1])).sum())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(20, 99), st.integers(20, 99)), min_size=3, max_size=6),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
def test_no_other_way_to_share_them_out_changes_aspect_ratios_less(pictures, samples):
    widths, heights = np.array(pictures).T
    given_samples = dict(zip(SIZES, samples, strict=True))
    sizes = share_out(given_samples, widths, heights, what="x")
    assert {tuple(size) for size in sizes.tolist()} == set(SIZES)
    best = min(distortion(widths, heights, sizes[list(p)]) for p in permutations(range(len(sizes))))
    assert distortion(widths, heights, sizes) == pytest.approx(best)


def test_pictures_made_in_proportion_keep_their_size():
    samples = {(48, 80): 1, (64, 64): 30, (96, 96): 4, (80, 48): 7}
    made = np.array(in_proportion(samples, 50, each=True))
    assert np.array_equal(share_out(samples, *made.T, what="x"), made)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 60))
def test_every_bucket_gets_one_and_about_its_share(samples, count):
    shares = {(number, 1): many for number, many in enumerate(samples)}
    sizes = in_proportion(shares, count, each=True)
    assert sizes == in_proportion(shares, count + 1, each=True)[:count]
    counts = Counter(sizes)
    assert len(counts) == min(count, len(samples))
    for size, many in shares.items():
        wanted = count * many / sum(samples)
        assert counts[size] <= max(1, wanted + 1)


def test_too_few_class_pictures_are_refused_with_a_remedy():
    with pytest.raises(UserError, match=r"a dog: 2 class pictures .* 3 buckets.*class_images"):
        share_out(dict.fromkeys(SIZES, 1), np.array([5, 6]), np.array([5, 5]), what="a dog")


def test_samples_are_counted_per_bucket_and_source():
    sizes = np.array([(64, 64), (48, 80), (64, 64), (64, 64)], np.int32)
    sources = np.array([0, 0, 0, 1], np.int32)
    order = Order(sizes, seed=0, batch_size=2, sources=sources, repeats=(2, 5))
    assert samples_per_bucket(order, [0]) == {(48, 80): 2, (64, 64): 4}
    assert samples_per_bucket(order, [0, 1]) == {(48, 80): 2, (64, 64): 9}
    assert order.samples_before(3)[1, (64, 64)] == 15
