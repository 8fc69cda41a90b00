import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import splitting
from data.splitting import SPLIT, read_sides, write_sides
from train.config import UserError


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]


def hold_out(sha256, groups, kept=None, **options):
    kept = np.ones(len(sha256), bool) if kept is None else kept
    return splitting.hold_out(sha256, np.asarray(groups), kept, **options)[0]


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


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=40, max_size=40), st.floats(0.05, 0.95))
def test_what_filters_leave_out_moves_nobody(kept, share):
    groups = np.arange(40) % 23
    every = hold_out(digests(40), groups, wanted=share)
    assert (hold_out(digests(40), groups, np.array(kept), wanted=share) == every).all()


@pytest.mark.parametrize("wanted", [0.3, 8])
def test_what_was_held_out_or_trained_on_before_stays_so(wanted):
    held_out, sides = splitting.hold_out(
        digests(30), np.arange(30), np.ones(30, bool), wanted=wanted
    )
    # Each has a twin now, some of which have a lesser hash, and others are new.
    groups = np.concatenate([np.arange(30), np.arange(60)])
    again = hold_out(digests(90), groups, wanted=wanted, before=sides)
    assert (again[:30] == held_out).all() and (again[30:60] == held_out).all()
    assert 0 < held_out.sum() < 30
    # A picture that joins what was held out to what was trained on holds out both.
    joined = hold_out(digests(30), np.zeros(30, int), wanted=wanted, before=sides)
    assert joined.all()


def test_a_number_counts_what_is_kept_and_fills_up():
    kept = np.arange(60) % 2 == 0
    held_out, sides = splitting.hold_out(digests(60), np.arange(60), kept, wanted=5)
    assert (held_out & kept).sum() == 5 and len(sides) == 30
    fewer = kept & ~(held_out & (np.cumsum(held_out) <= 2))
    again = hold_out(digests(60), np.arange(60), fewer, wanted=5, before=sides)
    assert (again[kept] == held_out[kept]).all()
    more = hold_out(digests(60), np.arange(60), fewer | ~kept, wanted=5, before=sides)
    assert (more & (fewer | ~kept)).sum() == 5 and (more[kept] == held_out[kept]).all()


def test_sides_are_remembered_for_the_same_settings_only(tmp_path):
    sides = dict(zip(digests(4), [True, False, False, True], strict=True))
    assert read_sides(tmp_path, wanted=0.5, seed=1) == {}
    write_sides(tmp_path, sides, wanted=0.5, seed=1)
    assert read_sides(tmp_path, wanted=0.5, seed=1) == sides
    assert read_sides(tmp_path, wanted=0.5, seed=2) == {}
    (tmp_path / SPLIT).write_text("[]")
    with pytest.raises(UserError, match="remove it to draw anew"):
        read_sides(tmp_path, wanted=0.5, seed=1)
