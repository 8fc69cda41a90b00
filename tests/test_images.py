"""data/images.py: every readable file upright, in sRGB, and as large as its bucket."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, ImageOps

from data import images
from data.examine import decoded_size
from data.images import (
    COVER,
    EXTENSIONS,
    UNREADABLE_EXTENSIONS,
    crop_centres,
    decode,
    fit,
    fit_geometry,
    open_image,
    orientation,
    to_tensor,
)
from tests import bad_images
from train.config import ROOT


def corners() -> Image.Image:
    """60 x 40: red, green / blue, white quarters, so that every orientation shows."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    pixels[20:, 30:] = 250
    return Image.fromarray(pixels)


def stored(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95, "subsampling": 0} | options))
    return file


def png(width: int, height: int, colour_type: int, pixels: bytes) -> io.BytesIO:
    """A PNG of 16 bits, which Pillow does not write in colour; before each row of `pixels` a 0."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_applied_as_pillow_does(kind, value):
    exif = Image.Exif()
    exif[0x0112] = value
    file = stored(corners(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    upright = open_image(file)
    assert np.array_equal(np.asarray(upright), np.asarray(expected))
    size = decoded_size(file.getvalue())
    assert size == upright.size == ((60, 40) if value < 5 else (40, 60))


def test_broken_exif_is_as_none():
    file = stored(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert open_image(file).size == (60, 40)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert orientation(Image.open(stored(corners(), "PNG", exif=exif))) == 1


def test_transparency_lies_on_the_background():
    image = corners().convert("RGBA")
    image.putalpha(0)
    for variant in (image, image.convert("LA")):
        flat = open_image(stored(variant, "PNG"), (10, 20, 30))
        assert flat.mode == "RGB" and flat.getpixel((5, 5)) == (10, 20, 30)
    palette = corners().quantize(4)
    index = palette.getpixel((0, 0))
    flat = open_image(stored(palette, "PNG", transparency=index), (10, 20, 30))
    assert flat.getpixel((0, 0)) == (10, 20, 30) and flat.getpixel((59, 39)) == (250, 250, 250)


def test_sixteen_bits_keep_their_brightness():
    ramp = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        grey = np.asarray(open_image(stored(Image.fromarray(ramp), kind)))
        assert np.abs(grey[..., 0] - ramp / 257).max() <= 0.51
        assert np.array_equal(grey[..., 0], grey[..., 2])


def test_sixteen_bits_of_colour_and_of_transparency_keep_theirs():
    colour = struct.pack(">3H", 65535, 32768, 257)
    assert open_image(png(1, 1, 2, b"\0" + colour)).getpixel((0, 0)) == (255, 128, 1)
    half = png(1, 1, 6, b"\0" + colour + struct.pack(">H", 32768))
    red, green, blue = open_image(half, (0, 0, 0)).getpixel((0, 0))
    assert (red, green, blue) == (128, 64, 1)
    grey = Image.fromarray(np.array([[1000, 2000]], np.uint16))
    flat = open_image(stored(grey, "PNG", transparency=1000), (10, 20, 30))
    assert flat.getpixel((0, 0)) == (10, 20, 30) and flat.getpixel((1, 0)) == (8, 8, 8)


def test_lab_is_converted():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = corners().point(lambda level: 60 + level // 2)
    converted = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert converted is not None
    assert difference(open_image(stored(converted, "TIFF")), image) < 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_look_the_same(mode):
    image = corners().convert(mode)
    kind = "JPEG" if mode == "YCbCr" else "TIFF"
    assert difference(open_image(stored(image, kind)), image.convert("RGB")) < 2


def test_floating_point_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="8-bit"):
        open_image(stored(Image.new("F", (8, 8)), "TIFF"))


def test_animations_and_multi_pictures_give_their_first_frame():
    other = Image.new("RGB", (60, 40), (9, 9, 9))
    for kind in ("GIF", "WEBP", "MPO"):
        file = stored(corners(), kind, save_all=True, append_images=[other])
        assert difference(open_image(file), corners()) < 4


def test_profiles_are_converted_and_broken_ones_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(open_image(stored(corners(), "PNG", icc_profile=srgb)), corners()) < 1
    assert difference(open_image(stored(corners(), "PNG", icc_profile=b"no")), corners()) == 0
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert difference(open_image(stored(corners(), "PNG", icc_profile=lab)), corners()) == 0
    # Red and green exchanged in the profile's primaries must be exchanged in what comes out.
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    converted = open_image(stored(corners(), "PNG", icc_profile=swapped))
    red, green, _ = converted.getpixel((5, 5))
    assert green > 200 and red < 50


def test_only_profiles_that_change_something_are_applied():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    assert images._transform(srgb, "RGB") is None
    assert images._transform(swapped, "RGB") is not None


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    for limit in (Image.MAX_IMAGE_PIXELS, None):  # which others may have set
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(Image.DecompressionBombError, match="178956970"):
            decode(png(1_000_000, 1000, 0, b""))


def test_a_panorama_is_read_without_a_warning():
    code = """
import io
from PIL import Image
from data.images import decode
file = io.BytesIO()
Image.new("L", (60, 40)).save(file, "PNG")
Image.MAX_IMAGE_PIXELS = 2000
assert decode(file).size == (60, 40)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_read_has_a_remedy():
    assert not EXTENSIONS & UNREADABLE_EXTENSIONS.keys()
    assert all("convert it" in remedy for remedy in UNREADABLE_EXTENSIONS.values())


def test_postscript_in_disguise_is_not_opened(tmp_path: Path):
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(Image.UnidentifiedImageError):
        open_image(file)


@pytest.mark.parametrize("shape", [(100, 100), (300, 50), (50, 300), (17, 31), (1, 1), (640, 641)])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
def test_geometry_covers_the_size_and_stays_inside(shape, size):
    scale, (left, top, right, bottom), cropped = fit_geometry(*shape, size)
    assert 0 <= left < right <= shape[0] and 0 <= top < bottom <= shape[1]
    assert (right - left) * scale == pytest.approx(size[0])
    assert (bottom - top) * scale == pytest.approx(size[1])
    assert left == pytest.approx(shape[0] - right) and top == pytest.approx(shape[1] - bottom)
    assert cropped == pytest.approx(1 - size[0] * size[1] / scale**2 / (shape[0] * shape[1]))
    assert fit(Image.new("RGB", shape), size).shape == (size[1], size[0], 3)


@pytest.mark.parametrize(
    ("centre", "left", "top"),
    [((0.5, 0.5), 100, 0), ((0.6, 0.1), 140, 0), ((0, 1), 0, 0), ((1, 1), 200, 0)],
)
def test_the_box_is_about_its_centre_as_far_as_the_picture_goes(centre, left, top):
    box = fit_geometry(400, 200, (64, 64), centre).box
    assert box == pytest.approx((left, top, left + 200, top + 200))
    stripes = Image.new("RGB", (400, 200))
    stripes.paste((250, 0, 0), (left, 0, left + 200, 200))
    assert np.array_equal(fit(stripes, (64, 64), centre)[:, 8:56, 0], np.full((64, 48), 250))


def centres(crop: str, size=(64, 64), sha256="ab", variants=3, focus=None):
    how = {"crop": crop, "focus": focus, "sha256": sha256, "variants": variants}
    return crop_centres(400, 200, size, **how)


def test_crops_are_central_about_the_focus_or_random_by_content():
    assert centres("centre", focus=(0.1, 0.2)) == centres("focus") == [(0.5, 0.5)]
    assert centres("focus", focus=(0.1, 0.2)) == [(0.1, 0.2)]
    three = centres("random")
    assert three == centres("random", variants=8)[:3] != centres("random", sha256="cd")
    assert len(set(three)) == 3 and {y for _, y in three} == {0.5}  # no slack upwards
    assert centres("random", size=(128, 64)) == [(0.5, 0.5)] * 3
    many = np.array(centres("random", variants=400))[:, 0]
    assert 0.25 <= many.min() < 0.27 and 0.73 < many.max() <= 0.75
    assert many.mean() == pytest.approx(0.5, abs=0.02)
    assert many.std() == pytest.approx(0.5 / 12**0.5, abs=0.01)


@given(st.tuples(*[st.integers(1, 3000)] * 2), st.tuples(*[st.integers(1, 12)] * 2), st.text())
@settings(deadline=None, max_examples=50)
def test_random_boxes_are_inside_and_where_their_centres_say(shape, steps, sha256):
    size = (64 * steps[0], 64 * steps[1])
    for x, y in crop_centres(*shape, size, crop="random", focus=None, sha256=sha256, variants=2):
        left, top, right, bottom = fit_geometry(*shape, size, (x, y)).box
        assert 0 <= left < right <= shape[0] and 0 <= top < bottom <= shape[1]
        assert (left + right) / 2 == pytest.approx(x * shape[0], abs=1e-6 * shape[0])
        assert (top + bottom) / 2 == pytest.approx(y * shape[1], abs=1e-6 * shape[1])


def test_a_picture_of_the_right_size_is_untouched_and_a_wide_one_keeps_its_middle():
    assert np.array_equal(fit(corners(), (60, 40)), np.asarray(corners()))
    stripes = Image.new("RGB", (300, 100), (255, 0, 0))
    stripes.paste((0, 0, 255), (95, 0, 205, 100))
    assert (fit(stripes, (64, 64)) == (0, 0, 255)).all()


@pytest.mark.parametrize("value", [1, 6])
def test_a_big_jpeg_is_decoded_small_and_looks_the_same(value):
    exif = Image.Exif()
    exif[0x0112] = value
    smooth = corners().resize((2400, 600), Image.Resampling.BICUBIC)
    file = stored(smooth, "JPEG", quality=95, exif=exif)
    size = (256, 64) if value == 1 else (64, 256)
    quick, slow = open_image(file, cover=size), open_image(file)
    assert quick.width <= slow.width / 4
    assert quick.width >= COVER * size[0] and quick.height >= COVER * size[1]
    assert np.abs(fit(quick, size).astype(float) - fit(slow, size)).mean() < 1


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
@pytest.mark.parametrize("size", [(320, 256), (384, 320), (512, 384)])
def test_decoding_small_costs_no_quality(kind, size):
    detailed = photo(1600, 1200)
    file = stored(detailed, kind, quality=90, save_all=kind == "MPO", append_images=[corners()])
    assert decode(file, cover=size).width < 1600
    slow = fit(open_image(file), size).astype(float)
    error = fit(open_image(file, cover=size), size) - slow
    assert np.abs(error).mean() < 1.2
    assert 10 * np.log10(255**2 / (error**2).mean()) > 42  # dB


def photo(width: int, height: int) -> Image.Image:
    """Grain of all sizes, as natural pictures have it, with edges and text on it."""
    rng = np.random.default_rng(0)
    octaves = [
        Image.fromarray(rng.normal(0, 14, (height >> k, width >> k)).astype(np.float32)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for k in range(2, 7)
    ]
    grey = 128 + sum(np.asarray(octave) for octave in octaves)
    pixels = grey[..., None] + rng.normal(0, 3, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for k in range(12):
        draw.ellipse(
            [k * 120, k * 90, k * 120 + 200, k * 90 + 120], fill=(20 * k, 250 - 20 * k, 90)
        )
        draw.text(
            (k * 110, 1100 - k * 80), "A caption on the picture", "white", font_size=14 + 3 * k
        )
    return image


def test_tensors_are_channels_first_in_minus_one_to_one():
    tensor = to_tensor(np.asarray(corners().crop((0, 0, 31, 20))))
    assert tensor.shape == (3, 20, 31) and str(tensor.dtype) == "torch.float32"
    assert tensor[0, 0, 0] == pytest.approx(250 / 127.5 - 1) and tensor[2, 0, 0] == -1


@pytest.mark.parametrize("cover", [None, (1, 1), (30, 20)])
def test_a_broken_png_is_refused_at_any_size(cover):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = bytearray(stored(noise, "PNG").getvalue())
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(OSError):
        decode(io.BytesIO(content), cover=cover)


def test_the_levels_of_a_deep_tiff_are_spread_over_all():
    """Also for those that take the picture as it is decoded, as depth maps are."""
    content = dict(bad_images.kinds())
    for name in ("inverted-16.tif", "grey-12.tif"):
        levels = np.asarray(decode(io.BytesIO(content[name][0])))
        assert (levels.min(), levels.max()) == (0, 65535) and levels[0, 0] == 0
