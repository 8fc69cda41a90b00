"""data/buckets.py: the sizes, and which picture gets which."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.buckets import account, assign, bucket_table, make_buckets, plan_buckets, too_small
from data.images import Size, fit_geometry
from train.config import UserError

shapes = st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)), max_size=20)
settings_of_buckets = st.sampled_from([(768, 64), (512, 64), (1024, 64), (128, 32), (100, 8)])


def plan(pictures: list[Size], **options) -> list[Size]:
    widths, heights = np.array(pictures, np.int32).reshape(-1, 2).T
    return [(int(w), int(h)) for w, h in plan_buckets(widths, heights, **options)]


def nearest(width: int, height: int, buckets: list[Size]) -> Size:
    """`assign` as its docstring says it, in exact arithmetic."""

    def distance(bucket: Size) -> tuple[Fraction, Fraction, int, int]:
        one, other = Fraction(width, height), Fraction(*bucket)
        shape = max(other, 1 / other)
        return max(one / other, other / one), shape, -bucket[0] * bucket[1], -bucket[0]

    return min(buckets, key=distance)


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


@given(shapes, settings_of_buckets)
@example([(512, 1024), (500, 1000), (1024, 512), (1, 20_000), (7, 7)], (512, 64))  # 1:2 is a tie
@settings(deadline=None, max_examples=60)
def test_planning_is_assigning_each_picture_exactly(pictures, how):
    resolution, step = how
    buckets = make_buckets(resolution, step=step)
    planned = plan(pictures, resolutions=[resolution], step=step)
    assert planned == [nearest(*picture, buckets) for picture in pictures]
    assert planned == [assign(*picture, buckets) for picture in pictures]


@given(shapes, st.lists(st.sampled_from([256, 512, 768]), min_size=1, unique=True), st.booleans())
@settings(deadline=None, max_examples=60)
def test_sizes_keep_to_the_area_the_steps_and_the_sides(pictures, resolutions, upscale):
    if not upscale:
        pictures = [picture for picture in pictures if min(picture) >= 64]
    sizes = plan(pictures, resolutions=resolutions, step=64, max_side=1024, upscale=upscale)
    assert len(sizes) == len(pictures)
    turned = plan(
        [(height, width) for width, height in pictures],
        resolutions=resolutions,
        step=64,
        max_side=1024,
        upscale=upscale,
    )
    for (width, height), size, other in zip(pictures, sizes, turned, strict=True):
        assert size == other[::-1] or width == height
        assert size[0] % 64 == size[1] % 64 == 0 < min(size)
        enlarged = size[0] > width or size[1] > height
        allowed = min(resolutions) if enlarged else max(resolutions)
        assert size[0] * size[1] <= allowed**2 and max(size) <= 1024
        assert upscale or not enlarged


def test_of_several_resolutions_the_largest_that_is_filled():
    pictures = [
        (4000, 4000),
        (1024, 1024),
        (1023, 1023),
        (600, 600),
        (300, 300),
        (900, 700),
        (1100, 1000),
    ]
    assert plan(pictures, resolutions=[512, 1024], step=64) == [
        *[(1024, 1024)] * 2,
        *[(512, 512)] * 3,
        (576, 448),
        (1088, 960),
    ]


def test_without_upscaling_small_pictures_get_the_largest_size_inside_them():
    pictures = [(300, 200), (64, 127), (5000, 300), (700, 700), (767, 5000)]
    assert plan(pictures, resolutions=[768], step=64, upscale=False) == [
        (256, 192),
        (64, 64),
        (1536, 256),
        (640, 640),
        (384, 1536),
    ]
    widths, heights = np.array([(63, 900), (64, 64), (900, 1)]).T
    assert too_small(widths, heights, 64).tolist() == [True, False, True]
    with pytest.raises(AssertionError, match="left out"):
        plan([(63, 900)], resolutions=[768], step=64, upscale=False)


@given(shapes.filter(len))
@settings(deadline=None, max_examples=40)
def test_the_account_is_the_geometry_of_each_picture(pictures):
    widths, heights = np.array(pictures, np.int32).T
    sizes = plan_buckets(widths, heights, resolutions=[512], step=64)
    scale, cropped, enlarged = account(widths, heights, sizes)
    for row, (picture, size) in enumerate(zip(pictures, sizes, strict=True)):
        fit = fit_geometry(*picture, (int(size[0]), int(size[1])))
        assert scale[row] == fit.scale and enlarged[row] == (fit.scale > 1)
        assert cropped[row] == pytest.approx(fit.cropped, abs=1e-9)


def test_the_table_counts_and_measures_the_crop():
    pictures = np.array([(200, 100), (100, 100), (50, 50), (200, 100)])
    sizes = np.array([(64, 64)] * 3 + [(128, 64)])
    square, wide = bucket_table(sizes, account(*pictures.T, sizes))
    assert (square.size, square.images, square.enlarged) == ((64, 64), 3, 1)
    assert square.cropped == pytest.approx(0.5 / 3) and square.most_cropped == pytest.approx(0.5)
    assert (wide.size, wide.images, wide.cropped, wide.enlarged) == ((128, 64), 1, 0, 0)
    assert bucket_table(sizes[:0], account(*pictures[:0].T, sizes[:0])) == []
