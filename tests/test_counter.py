"""data/counter.py: numbers that depend on their purpose and on nothing else."""

import numpy as np

from data import counter


def test_same_purpose_same_numbers_whatever_was_drawn_before():
    before = counter.normal((4, 3), 7, "noise", 5, "a.png")
    np.random.seed(0)
    counter.uniform(7, "flip", 5)
    assert np.array_equal(before, counter.normal((4, 3), 7, "noise", 5, "a.png"))


def test_purposes_that_look_alike_differ():
    purposes = [("ab", "c"), ("a", "bc"), ("abc",), ("1",), (1,), (1, 1), (11,), ("a,b",), ()]
    draws = {counter.uniform(0, *purpose) for purpose in purposes}
    draws |= {counter.uniform(1), counter.uniform(-1), counter.uniform(0, "ü"), counter.uniform(2)}
    assert len(draws) == len(purposes) + 4


def test_numpy_integers_count_as_integers():
    assert counter.uniform(np.int64(3), np.int32(4)) == counter.uniform(3, 4)


def test_distributions():
    normal = counter.normal((100_000,), 0, "n")
    assert normal.dtype == np.float32
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    across = np.array([counter.uniform(0, "u", step) for step in range(4000)])
    assert abs(across.mean() - 0.5) < 0.03 and abs(across.std() - 12**-0.5) < 0.02
    integers = [counter.integer(10, 0, "i", step) for step in range(2000)]
    assert set(integers) == set(range(10)) and max(np.bincount(integers)) < 270


def test_neighbouring_steps_are_uncorrelated():
    first, second = (counter.normal((50_000,), 0, "noise", step, "a") for step in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
