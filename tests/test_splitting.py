import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.splitting import hold_out
from train.config import UserError


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_a_group_is_on_one_side(labels, share):
    labels = np.array(labels)
    held_out = hold_out(digests(len(labels)), labels, wanted=share)
    for label in set(labels.tolist()):
        assert len(set(held_out[labels == label].tolist())) == 1


def test_new_pictures_move_no_others():
    few = hold_out(digests(500), np.arange(500), wanted=0.2)
    many = hold_out(digests(2000), np.arange(2000)[::-1], wanted=0.2)
    assert (many[:500] == few).all()
    assert 0.17 < many.mean() < 0.23


def test_another_seed_holds_out_others():
    first = hold_out(digests(500), np.arange(500), wanted=0.2, seed=0)
    assert (hold_out(digests(500), np.arange(500), wanted=0.2, seed=1) != first).any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 30), min_size=5, max_size=40), st.integers(1, 4))
def test_a_number_is_not_exceeded_and_is_met_by_single_pictures(labels, count):
    held_out = hold_out(digests(len(labels)), np.array(labels), wanted=count)
    assert held_out.sum() <= count
    assert hold_out(digests(len(labels)), np.arange(len(labels)), wanted=count).sum() == count


def test_something_is_left_to_train_on():
    with pytest.raises(UserError, match="held_out=3 of 3 pictures"):
        hold_out(digests(3), np.arange(3), wanted=3)
