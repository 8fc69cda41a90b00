"""Items taken one ahead, by a thread."""

import gc
import threading
import weakref

import pytest

from data.ahead import ahead


class Source:
    """Counts up to `count`, then raises `error` if there is one; notes what was taken."""

    def __init__(self, count, error=None):
        self.count, self.error, self.taken = count, error, 0
        self.next_is_taken = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.count:
            raise self.error or StopIteration
        self.taken += 1
        self.next_is_taken.set()
        return self.taken


def test_all_come_in_order():
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert list(ahead(iter([]))) == []


def test_the_next_is_taken_while_one_is_worked_on_and_no_more():
    source = Source(10)
    items = ahead(source)
    assert next(items) == 1
    while source.taken < 3:  # one waits, and one is offered
        source.next_is_taken.wait(5)
        source.next_is_taken.clear()
    assert source.taken == 3
    assert list(items) == [*range(2, 11)]


def test_an_error_comes_in_its_place():
    items = ahead(Source(2, ValueError("third")))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(items)


def test_closed_early_it_lets_go_of_the_source():
    source = Source(10)
    gone, items = weakref.ref(source), ahead(source)
    next(items)
    before = threading.active_count()
    items.close()
    assert threading.active_count() == before - 1
    del source, items
    gc.collect()
    assert gone() is None
