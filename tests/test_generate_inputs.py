"""Sizes, crops and files of the pictures given to scripts/generate.py."""

import numpy as np
import pytest
from PIL import Image

from scripts.generation.config import GenerateConfig
from scripts.generation.inputs import listed, note_sizes, pasted, sources, target_size
from train.config import UserError


@pytest.fixture
def picture(tmp_path):
    def save(name, size, colour=(10, 20, 30), **how):
        Image.new("RGB", size, colour).save(tmp_path / name, **how)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    ("own", "asked", "native", "expected"),
    [
        ((512, 512), (None, None), 512, (512, 512)),
        ((500, 333), (None, None), 512, (504, 336)),
        ((3, 300), (None, None), 512, (8, 304)),
        ((500, 333), (768, 512), 512, (768, 512)),
        ((1000, 500), (512, None), 512, (512, 256)),
        ((1000, 500), (None, 512), 512, (1024, 512)),
        ((4000, 3000), (None, None), 768, (888, 664)),
        ((4000, 3000), (None, None), None, (4000, 3000)),
        ((1024, 512), (None, None), 512, (1024, 512)),
    ],
)
def test_the_size_is_the_picture_s_own_as_far_as_can_be(own, asked, native, expected):
    assert target_size(own, *asked, native) == expected


def test_a_photograph_is_turned_upright_cropped_and_that_is_said(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = picture("a.jpg", (100, 60), exif=exif)
    (source,) = sources(GenerateConfig(output="x", prompt="x", image=file), "img2img", None)
    assert source.own == (60, 100) and source.size == (64, 104)
    assert source.pixels().shape == (104, 64, 3)
    assert note_sizes([source]) == "note: resized and cropped: a.jpg 60 x 100 as 64 x 104"


def test_outpainting_keeps_the_middle_and_paints_the_margins(tmp_path, picture):
    file = picture("a.png", (32, 32))
    config = GenerateConfig(output="x", prompt="x", image=file, outpaint=[8, 0, 16, 24])
    (source,) = sources(config, "inpaint", None)
    assert source.size == (56, 56)
    mask = source.repainted()
    assert not mask[:32, 8:40].any() and (mask == 255).sum() == 56 * 56 - 32 * 32
    assert (source.pixels() == (10, 20, 30)).all()


def test_transparent_masks_and_those_of_another_size_fit(tmp_path, picture):
    file = picture("a.png", (64, 64))
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    keys = {"image": file, "mask": tmp_path / "mask.png"}
    (source,) = sources(GenerateConfig(output="x", prompt="x", **keys), "inpaint", None)
    assert not source.repainted()[:, :32].any() and (source.repainted()[:, 32:] == 255).all()


def test_pasting_back_fades_over_the_blur_within_what_is_white():
    original, made = np.zeros((8, 32, 3), np.uint8), np.full((8, 32, 3), 200, np.uint8)
    mask = np.zeros((8, 32), np.uint8)
    mask[:, 16:] = 255
    hard = pasted(made, original, mask, 0)
    assert (hard[:, :16] == 0).all() and (hard[:, 16:] == 200).all()
    soft = pasted(made, original, mask, 4)[0, :, 0].astype(int)
    assert (soft[:16] == 0).all() and (np.diff(soft[15:21]) > 0).all() and (soft[20:] == 200).all()
    mask[:, 22:] = 0  # what is narrower than the blur is repainted in its middle
    narrow = pasted(made, original, mask, 8)[0, :, 0]
    assert (narrow[18:20] == 200).all() and not narrow[:16].any() and not narrow[22:].any()


def test_a_folder_gives_its_pictures_in_order(tmp_path, picture):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        picture(name, (8, 8))
    (tmp_path / "notes.txt").write_text("x")
    assert [file.name for file in listed("image", tmp_path)] == ["a.JPG", "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="image=.*empty is a folder without pictures"):
        listed("image", tmp_path / "empty")


def test_a_bomb_is_refused(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    config = GenerateConfig(output="x", prompt="x", image=tmp_path / "bomb.png")
    with pytest.raises(UserError, match="image=.*bomb.png cannot be read .*limit of"):
        sources(config, "img2img", None)
