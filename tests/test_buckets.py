"""data/buckets.py: the sizes, and which picture gets which."""

import itertools
from pathlib import Path

import pytest

from data.buckets import assign, bucket_table, make_buckets
from data.sources import Record
from train.config import UserError


def test_the_published_buckets_at_768_pixels():
    buckets = make_buckets(768, min_side=320, max_side=1536)
    assert len(buckets) == 27
    assert min(width * height for width, height in buckets) / 768**2 == pytest.approx(
        0.833, abs=1e-3
    )


@pytest.mark.parametrize(
    ("resolution", "step"), [(768, 64), (512, 64), (128, 32), (128, 16), (100, 8)]
)
def test_sides_are_steps_within_the_area_and_closed_under_transposition(resolution, step):
    buckets = make_buckets(resolution, step=step)
    side = resolution // step * step
    assert (side, side) in buckets
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert min(width, height) >= resolution // 2 // step * step


@pytest.mark.parametrize(
    "arguments",
    [
        {"resolution": 32},
        {"resolution": 768, "min_side": 1024},
        {"resolution": 768, "max_side": 60},
    ],
)
def test_impossible_settings_are_named(arguments):
    with pytest.raises(UserError, match=str(arguments["resolution"])):
        make_buckets(**arguments)


def test_the_ratio_counts_not_the_difference():
    # 1:2 is nearer to 9:16 than to 1:3 by logarithm.
    assert assign(100, 200, [(576, 1024), (320, 960)]) == (576, 1024)
    assert assign(3000, 3000, make_buckets(768)) == (768, 768)
    assert assign(1, 1000, make_buckets(768)) == (384, 1536)


def test_a_transposed_picture_gets_the_transposed_bucket():
    for resolution, step in [(768, 64), (128, 32), (128, 64)]:
        buckets = make_buckets(resolution, step=step)
        for width, height in itertools.product(range(1, 60), repeat=2):
            if width != height:
                one, other = assign(width, height, buckets), assign(height, width, buckets)
                assert one == other[::-1]


def test_ties_do_not_depend_on_the_order_of_the_buckets():
    buckets = [(64, 128), (128, 64), (32, 64), (64, 32), (256, 64), (64, 256)]
    for order in (buckets, buckets[::-1]):
        assert assign(100, 100, order) == (128, 64)
        assert assign(50, 100, order) == (64, 128)
    assert assign(200, 100, [(256, 64), (64, 64)]) == (64, 64)


def test_the_table_counts_and_measures_the_crop():
    records = [
        Record(f"{n}.png", Path(), "", width, height, "")
        for n, (width, height) in enumerate([(200, 100), (100, 100), (50, 50)])
    ]
    square, wide = bucket_table([*records, records[0]], [(64, 64)] * 3 + [(128, 64)])
    assert (square.size, square.images, square.enlarged) == ((64, 64), 3, 1)
    assert square.cropped == pytest.approx(0.5 / 3)
    assert (wide.images, wide.cropped) == (1, 0)
