"""The invisible watermark: what it survives, what it costs, and what is not taken for one."""

import json

import numpy as np
import pytest
from PIL import Image

from eval import watermark
from scripts import benchmark
from scripts import watermark as command
from scripts.benchmarks import watermark_benchmark as bench
from scripts.benchmarks.watermark_benchmark import ATTACKS, Scale, decibels, drawn, textured
from train.config import UserError

MARK = b"a9\xff7"


@pytest.fixture(scope="module")
def marked():
    """Pictures of both kinds, and the same with a mark."""
    pictures = [*drawn(2, 512), *textured(1, 512)]
    return [(pixels, watermark.embed(pixels, MARK)) for pixels in pictures]


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_survives_jpeg_resizing_and_cropping(marked, attack):
    for _, pixels in marked:
        found = watermark.examine(ATTACKS[attack](pixels))
        assert found.payload == MARK
        assert found.scale == pytest.approx(0.75 if "resize" in attack else 1, abs=0.002)


def test_it_survives_in_small_drawn_pictures():
    pictures = [watermark.embed(pixels, MARK) for pixels in drawn(8, 128)]
    assert all(watermark.detect(pixels) == MARK for pixels in pictures)
    assert sum(watermark.detect(bench.jpeg(pixels)) == MARK for pixels in pictures) >= 7


def test_other_scales_and_cuts_are_found(marked):
    pixels = marked[0][1]
    for found in (
        pixels[37:301, 101:400],
        bench.resized(pixels[:400, 50:], 1.37),
        bench.jpeg(bench.resized(pixels[60:, 10:], 0.6), 85),
    ):
        assert watermark.detect(found) == MARK


def test_it_cannot_be_seen(marked):
    for pixels, changed in marked:
        assert changed.dtype == np.uint8 and changed.shape == pixels.shape
        assert decibels(pixels, changed) > 40
        assert np.abs(changed.astype(int) - pixels).max() <= 25
    small = next(iter(drawn(1, 128)))
    before = small.copy()
    again = [watermark.embed(small, MARK) for _ in range(2)]
    assert decibels(small, again[0]) > 40 and (small == before).all()
    assert (again[0] == again[1]).all()


@pytest.mark.parametrize("size", [(64, 64), (97, 300), (131, 129)])
def test_any_size_and_any_payload(size):
    grey = np.full((*size, 3), 120, np.uint8)
    for payload in (b"a", b"\0\0\0\1", b"\xff\xff\xff\xff"):
        pixels = watermark.embed(grey, payload, strength=3)
        assert pixels.shape == grey.shape and watermark.detect(pixels) == payload


def test_what_has_no_mark_is_not_taken_for_one(marked, monkeypatch):
    assert watermark.ATTEMPTS / 2 ** (8 * watermark.CHECK_BYTES) < 1e-6
    readings = []
    read = watermark._reading
    monkeypatch.setattr(watermark, "_reading", lambda *a: readings.append(read(*a)) or readings[-1])
    for pixels in (
        next(iter(drawn(1, 128))),
        next(iter(textured(1, 160))),
        np.zeros((96, 96, 3), np.uint8),
        np.full((70, 90, 3), 255, np.uint8),
        np.zeros((5, 400, 3), np.uint8),
    ):
        readings.clear()
        assert watermark.detect(pixels) is None
        assert len(readings) <= watermark.ATTEMPTS


def test_one_wrong_bit_is_no_watermark():
    whole = watermark._with_check(MARK)
    assert len(whole) == 7
    for bit in range(32):
        other = bytearray(MARK)
        other[bit // 8] ^= 1 << bit % 8
        assert watermark._with_check(bytes(other))[4:] != whole[4:]


def test_the_pattern_is_in_the_middle_coefficients_of_the_low_band():
    random = np.random.default_rng(0)
    count = 64 * len(watermark._places())
    coefficients = random.standard_normal(count)
    tile = watermark._to_pixels(coefficients)
    assert np.allclose(watermark._to_coefficients(tile), coefficients)
    assert np.isclose((tile**2).sum(), (coefficients**2).sum())  # orthonormal
    blocks = tile.reshape(64, 2, 64, 2)
    assert np.allclose(blocks, blocks[:, :1, :, :1])  # the wavelet's high bands are empty
    assert np.allclose(watermark._cosines() @ watermark._cosines().T, np.eye(8))


def test_what_cannot_be_embedded_is_named():
    picture = np.zeros((64, 64, 3), np.uint8)
    for payload in (b"", b"12345", b"1\0"):
        with pytest.raises(ValueError, match="1 to 4 bytes"):
            watermark.embed(picture, payload)
    with pytest.raises(ValueError, match="needs 64 pixels a side, not 64 x 63"):
        watermark.embed(picture[:63], b"a")


# Commands


def test_the_command_finds_them(tmp_path, capsys):
    plain = next(iter(drawn(1, 128)))
    Image.fromarray(watermark.embed(plain, b"toy1")).save(tmp_path / "a.png")
    Image.fromarray(plain).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    command.main([f"pictures={tmp_path}"])
    text = capsys.readouterr().out
    assert "a.png  'toy1' at scale 1.0" in text and "b.png  -" in text
    assert "c.png  cannot be read" in text and "watermarks in 1 of 3 pictures" in text
    command.main([f"pictures={tmp_path / 'a.png'}", "format=json"])
    assert json.loads(capsys.readouterr().out)["watermark"] == "toy1"
    for wrong in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="pictures="):
            command.main([f"pictures={tmp_path / wrong}"])


def test_the_benchmark_has_a_row_for_each_kind_and_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", Scale((96,), 1))
    output = tmp_path / "figures.json"
    benchmark.main(["watermark", "quick=true", f"output={output}"])
    results = json.loads(output.read_text())["results"]
    assert results.keys() == {"drawn", "textured"}
    measured = results["drawn"]["96"]
    assert measured["attacks"].keys() == ATTACKS.keys() and measured["false"] == 0
    assert 0.4 < measured["attacks"]["none"]["bits"] <= 1
    assert capsys.readouterr().out.count("\n| ") == 2 + 2
