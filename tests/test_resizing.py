import numpy as np
import pytest

from eval.resizing import Input, clean, legacy_tf, resize


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_clean_is_antialiased_and_keeps_the_mean():
    checker = (np.indices((64, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = clean(np.stack([checker] * 3, axis=-1), 16)
    assert small.shape == (16, 16, 3) and small.dtype == np.float32
    np.testing.assert_allclose(small, 127.5, atol=2)


def test_legacy_tf_skips_pixels():
    checker = (np.indices((64, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert (legacy_tf(np.stack([checker] * 3, axis=-1), 16) == 0).all()


def test_legacy_tf_enlarges_as_by_hand():
    # Columns 0, 2/3, 4/3 of 2, of which the last has no next pixel; rows likewise.
    pixels = np.repeat(np.array([[0, 90], [30, 240]], np.uint8)[..., None], 3, axis=2)
    t = 2 / 3
    across = [[0, 90 * t, 90], [30, 30 + 210 * t, 240]]
    between = [a + (b - a) * t for a, b in zip(*across, strict=True)]
    found = legacy_tf(pixels, 3)
    assert found.dtype == np.float32
    for channel in range(3):
        np.testing.assert_allclose(found[..., channel], [across[0], between, across[1]], rtol=1e-6)


@pytest.mark.parametrize("size", [(299, 40), (7, 640), (1, 1), (31, 31)])
def test_legacy_tf_is_tensorflow_1_pixel_by_pixel(size):
    pixels, side = _noise(*size), 31
    found = legacy_tf(pixels, side)
    rng, scales = np.random.default_rng(1), np.float32(np.array(size) / side)
    for row, column in rng.integers(0, side, (50, 2)):
        y, x = (
            float(np.float32(k) * scale) for k, scale in ((row, scales[0]), (column, scales[1]))
        )
        top, left = int(y), int(x)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        down, across = y - top, x - left
        corners = pixels[[top, top, bottom, bottom], [left, right, left, right]].astype(float)
        weights = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across)]
        expected = np.array([*weights, down * across]) @ corners
        np.testing.assert_allclose(found[row, column], expected, atol=1e-3)


@pytest.mark.parametrize("mode", ["clean", "legacy_tf"])
def test_a_picture_of_the_right_size_is_left_as_it_is(mode):
    pixels = _noise(24, 24)
    assert (resize(pixels, 24, mode=mode) == pixels).all()


@pytest.mark.parametrize("mode", ["clean", "legacy_tf"])
def test_levels_stay_between_0_and_255(mode):
    edges = np.where(np.indices((40, 40, 3))[1] % 8 < 4, 0, 255).astype(np.uint8)
    found = resize(edges, 63, mode=mode)
    assert found.min() >= 0 and found.max() <= 255


def test_what_a_network_reads_is_scaled_channels_first():
    reads = Input(8, "clean", (0.0, 64.0, 128.0), (255.0, 64.0, 128.0))
    pixels = _noise(8, 8)
    found = reads.prepare(pixels)
    assert found.shape == (3, 8, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found[1], pixels[..., 1] / 64.0 - 1, rtol=1e-6)
    assert str(reads) == "clean bicubic, squashed to 8x8"


def test_grey_or_float_pixels_are_our_own_mistake():
    reads = Input(8, "clean", (0.0,) * 3, (255.0,) * 3)
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(AssertionError):
            reads.prepare(wrong)
