import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from data.duplicates import Prints, compare, groups, hashes, matches_between, print_of, thin
from data.toy import render, sample_scene


def photo(number: int, size: tuple[int, int] = (256, 192)) -> Image.Image:
    """Clouds of all scales, and a few things in front of them."""
    rng = np.random.default_rng([7, number])
    width, height = size
    across, down = np.fft.rfftfreq(width) * width, np.fft.fftfreq(height)[:, None] * height
    falloff = 1 / np.maximum(1, np.hypot(across, down)) ** 1.4
    shape = (3, height, width // 2 + 1)
    clouds = np.fft.irfft2(falloff * np.exp(2j * np.pi * rng.random(shape)), s=(height, width))
    clouds = 128 + 40 * (clouds[:1] + 0.5 * clouds) / clouds.std()
    picture = Image.fromarray(np.moveaxis(clouds, 0, 2).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y, r = *rng.uniform(0, (width, height)), rng.uniform(8, 40)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return picture


def recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((0, round(0.01 * height), round(0.97 * width), round(0.98 * height)))


def with_something_added(image: Image.Image) -> Image.Image:
    changed = image.copy()
    ImageDraw.Draw(changed).ellipse((100, 60, 150, 110), fill=(255, 255, 0))
    return changed


def recoloured(image: Image.Image) -> Image.Image:
    hue, *rest = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda h: (h + 60) % 256), *rest)).convert("RGB")


SAME = {
    "resized": lambda image: image.resize((image.width // 2, image.height // 3)),
    "recompressed": recompressed,
    "cropped": cropped,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "mirrored": lambda image: recompressed(ImageOps.mirror(image)),
}
PHOTOS = [photo(number) for number in range(60)]


def prints(images: list[Image.Image]) -> Prints:
    return Prints(np.stack([print_of(image) for image in images]), np.arange(len(images)))


@pytest.mark.parametrize("change", SAME)
def test_a_changed_copy_is_found(change):
    both = prints([*PHOTOS, *map(SAME[change], PHOTOS)])
    same, bits, mirrored = compare(both, np.arange(60), np.arange(60, 120))
    assert same.mean() >= 0.95
    assert (bits[same] <= 10).all()
    assert (mirrored[same] == (change == "mirrored")).all()


@pytest.mark.parametrize("change", [with_something_added, recoloured])
def test_a_picture_that_differs_in_one_thing_is_told_apart(change):
    both = prints([*PHOTOS, *map(change, PHOTOS)])
    assert compare(both, np.arange(60), np.arange(60, 120))[0].mean() < 0.05


def test_different_photos_are_never_grouped():
    assert len(set(groups(prints(PHOTOS)))) == 60


def test_drawings_are_only_grouped_where_their_captions_agree():
    scenes = [sample_scene(3, number, width=128, height=128) for number in range(200)]
    labels = groups(prints([Image.fromarray(render(scene, 128, 128)) for scene in scenes]))
    for scene, label in zip(scenes, labels, strict=True):
        first = scenes[label]
        assert (scene.shape, scene.colour, scene.background) == (
            first.shape,
            first.colour,
            first.background,
        )


def test_groups_are_those_of_comparing_every_pair():
    images = [*PHOTOS[:20], *map(SAME["resized"], PHOTOS[:10]), *map(SAME["mirrored"], PHOTOS[:5])]
    found = prints(images)
    labels = groups(found)
    for k in range(len(images)):
        same = compare(found, np.full(len(images), k), np.arange(len(images)))[0]
        assert same.tolist() == (labels == labels[k]).tolist()


def test_of_a_chain_both_ends_that_differ_are_kept():
    film = [PHOTOS[0].crop((10 * step, 0, 10 * step + 180, 192)) for step in range(5)]
    found = prints(film)
    kept, matches = thin(found, [0, 1, 2, 3, 4])
    assert kept[0] == 0 and len(kept) > 1
    for match in matches:
        assert match.kept in kept and match.index not in kept
        assert compare(found, np.array([match.index]), np.array([match.kept]))[0][0]


def test_leaks_are_found_with_their_nearest():
    found = prints([*PHOTOS[:8], PHOTOS[30], SAME["mirrored"](PHOTOS[5])])
    matches = matches_between(found, np.arange(8), np.array([8, 9]))
    assert [(match.index, match.kept, match.mirrored) for match in matches] == [(5, 9, True)]


def test_empty_pictures_are_one_group_for_each_colour():
    plain = [Image.new("RGB", (40, 30), colour) for colour in ("white", "white", "navy", "white")]
    assert groups(prints(plain)).tolist() == [0, 0, 2, 0]


def test_hashes_of_a_mirror_image_agree():
    one, other = prints([PHOTOS[0]]), prints([ImageOps.mirror(PHOTOS[0])])
    same, mirrored = hashes(one, np.array([0]), mirrored=True), hashes(other, np.array([0]))
    assert np.bitwise_count(same ^ mirrored).item() <= 2
    assert groups(Prints(one.pixels[:0], one.index[:0])).tolist() == []
