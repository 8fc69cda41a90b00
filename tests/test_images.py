"""data/images.py: every readable file upright, in sRGB, and as large as its bucket."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data.images import decode, fit, fit_geometry, open_image, orientation, to_tensor, upright_size


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
    assert upright_size(decode(file)) == upright.size == ((60, 40) if value < 5 else (40, 60))


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
    assert quick.width >= 2 * size[0] and quick.height >= 2 * size[1]
    assert np.abs(fit(quick, size).astype(float) - fit(slow, size)).mean() < 1


def test_tensors_are_channels_first_in_minus_one_to_one():
    tensor = to_tensor(np.asarray(corners().crop((0, 0, 31, 20))))
    assert tensor.shape == (3, 20, 31) and str(tensor.dtype) == "torch.float32"
    assert tensor[0, 0, 0] == pytest.approx(250 / 127.5 - 1) and tensor[2, 0, 0] == -1
