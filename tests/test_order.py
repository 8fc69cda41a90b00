"""data/order.py: every picture as often as it should be, in batches of one size, at any step."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Order, share
from train.config import UserError

BUCKETS = np.array([(64, 64), (32, 64), (64, 32), (128, 32)], np.int32)
pictures = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40)
mixtures = st.one_of(
    st.none(),
    st.tuples(st.just("weights"), st.lists(st.floats(0.1, 10), min_size=3, max_size=3)),
    st.tuples(st.just("repeats"), st.lists(st.integers(1, 4), min_size=3, max_size=3)),
)


def epochs(order: Order, first: int, count: int = 1) -> list[tuple[int, int]]:
    """The (picture, repeat) of some epochs, in order."""
    batches = [order.batch(step) for step in steps(order, first, count)]
    return [(int(i), int(r)) for batch in batches for i, r in zip(*batch, strict=True)]


def steps(order: Order, first: int, count: int = 1) -> range:
    """The steps of some epochs."""
    start = sum(order.batches_in(epoch) for epoch in range(first))
    return range(start, start + sum(order.batches_in(first + more) for more in range(count)))


def orders(rows: list[tuple[int, int]], batch_size: int, mixture, seed: int = 3) -> Order:
    buckets, sources = np.array(rows).T
    options = {} if mixture is None else dict([mixture])
    return Order(BUCKETS[buckets], seed=seed, batch_size=batch_size, sources=sources, **options)


@given(pictures, st.integers(1, 9), mixtures)
@settings(deadline=None, max_examples=80)
def test_nothing_is_lost_and_nothing_is_there_too_often(rows, batch_size, mixture):
    order = orders(rows, batch_size, mixture)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row, []).append(index)
    for epoch in range(3):
        samples = epochs(order, epoch)
        assert len(samples) == len(set(samples)) == order.samples_in(epoch)
        times = Counter(index for index, _ in samples)
        assert set(times) == set(range(len(rows)))
        for index, often in times.items():
            assert {(index, repeat) for repeat in range(often)} <= set(samples)
            if mixture is None or mixture[0] == "repeats":
                assert often == (1 if mixture is None else mixture[1][rows[index][1]])
    times = Counter(index for index, _ in epochs(order, 0, 7))
    for members in groups.values():
        assert max(times[i] for i in members) - min(times[i] for i in members) <= 1


@given(pictures, st.integers(1, 9), mixtures, st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None, max_examples=60)
def test_the_processes_together_do_each_batch_once(rows, batch_size, mixture, world):
    order = orders(rows, batch_size, mixture)
    for step in steps(order, 1):
        indices, repeats = order.batch(step)
        assert indices.dtype == repeats.dtype == np.int64
        assert 0 < len(indices) == len(repeats) <= batch_size
        assert len({rows[index][0] for index in indices}) == 1
        parts = [share(len(indices), rank=rank, world=world) for rank in range(world)]
        assert len({len(positions) for positions, _ in parts}) == 1
        done = [(p, w) for part in parts for p, w in zip(*part, strict=True)]
        assert sorted(p for p, w in done if w > 0) == list(range(len(indices)))
        assert sum(w for _, w in done) == pytest.approx(1, abs=1e-5)
        assert sum(w == 0 for _, w in done) == -len(indices) % world


def test_short_batches_are_only_the_last_of_each_bucket():
    order = orders([(0, 0)] * 10 + [(1, 0)] * 3 + [(2, 0)], 4, None)
    lengths = Counter(len(order.batch(step)[0]) for step in steps(order, 0))
    assert lengths == {4: 2, 2: 1, 3: 1, 1: 1}


def test_weights_are_the_shares_of_the_samples():
    rng = np.random.default_rng(0)
    sources = np.repeat([0, 1, 2], [6000, 500, 70])
    sizes = BUCKETS[rng.integers(0, 4, len(sources))]
    order = Order(sizes, seed=0, batch_size=16, sources=sources, weights=[6, 3, 1])
    seen = Counter(sources[index] for index, _ in epochs(order, 5))
    assert order.samples_in(5) == pytest.approx(10_000, abs=6)
    assert [seen[source] for source in range(3)] == pytest.approx([6000, 3000, 1000], abs=4)
    assert len({index for index, _ in epochs(order, 5)}) == len(sources)


def test_a_step_is_the_same_however_it_is_reached():
    rows = [(n % 3, n % 2) for n in range(30)]
    walked = orders(rows, 4, ("repeats", [1, 2]))
    whole = [walked.batch(step) for step in range(40)]
    jumped = orders(rows, 4, ("repeats", [1, 2]))
    copy = pickle.loads(pickle.dumps(jumped))
    for step in (33, 2, 39, 0):
        for other in (jumped, copy):
            assert all(
                np.array_equal(*pair) for pair in zip(whole[step], other.batch(step), strict=True)
            )
    each = walked.batches_in(0)
    assert [walked.position(step) for step in (0, each - 1, each)] == [
        (0, 0),
        (0, each - 1),
        (1, 0),
    ]


def test_epochs_and_seeds_differ_and_batches_of_all_buckets_are_mixed():
    rows = [(n % 2, 0) for n in range(64)]
    one, other = orders(rows, 4, None), orders(rows, 4, None, seed=4)
    assert len({str(epochs(one, epoch)) for epoch in range(4)} | {str(epochs(other, 0))}) == 5
    buckets = [rows[one.batch(step)[0][0]][0] for step in range(16)]
    assert len(list(itertools.groupby(buckets))) > 4
    # Who shares a batch with whom changes too.
    partners = [
        {frozenset(one.batch(step)[0]) for step in range(16 * e, 16 * e + 16)} for e in (0, 1)
    ]
    assert not partners[0] & partners[1]


def test_over_time_a_source_s_pictures_are_seen_equally_often_whatever_their_bucket():
    """Few pictures to a bucket: rounding each bucket's share would favour some for good."""
    rows = [(0, 0)] * 60 + [(n % 4, 1) for n in range(42)]
    order = orders(rows, 8, ("weights", [0.5, 0.5]))
    times = Counter(index for index, _ in epochs(order, 0, 20))
    second = [times[index] for index in range(60, 102)]
    assert max(second) - min(second) <= 1
    assert sum(second) / sum(times.values()) == pytest.approx(0.5, abs=0.005)
    assert {len({i for i, _ in epochs(order, epoch)}) for epoch in range(20)} == {102}


def test_steps_and_epochs_agree_where_epochs_differ():
    rows = [(0, 0)] * 17 + [(n % 4, 1) for n in range(13)]
    order = orders(rows, 2, ("weights", [0.61, 0.39]))
    assert len({order.batches_in(epoch) for epoch in range(10)}) > 1
    walked = [order.position(step) for step in steps(order, 0, 10)]
    assert walked == [(e, b) for e in range(10) for b in range(order.batches_in(e))]
    again = orders(rows, 2, ("weights", [0.61, 0.39]))
    assert [again.position(step) for step in reversed(range(len(walked)))] == walked[::-1]
    assert order.epochs(order.batches_in(0)) == 1 and 0 < order.epochs(1) < 1


@pytest.mark.parametrize(("kind", "values"), [("weights", [1, 1e-12]), ("repeats", [1, 10**12])])
def test_an_epoch_without_end_is_refused(kind, values):
    with pytest.raises(UserError, match="source [12] would be there"):
        orders([(0, 0), (0, 1)], 2, (kind, values))
