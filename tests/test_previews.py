"""What previews give a depth or inpainting pipeline beside each prompt."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.maps import depth_latent
from tests.tiny import tiny_pipeline
from train.families import Family, family_of
from train.previews import beside

DEPTH, INPAINTING = Family(2, 5), Family(2, 9)


@pytest.fixture
def wide(tmp_path):
    """A picture twice as wide as high, its middle red, with map and mask beside it."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    across, down = np.meshgrid(np.arange(128), np.arange(64))
    depth = (across * 400 + down * 7).astype(np.uint16)
    Image.fromarray(depth).save(tmp_path / "wide.depth.png")
    Image.fromarray(((across >= 64) * 255).astype(np.uint8)).save(tmp_path / "wide.mask.png")
    return tmp_path / "wide.png"


def test_a_depth_pipeline_gets_the_middle_of_picture_and_map_as_training_would(wide):
    pipeline = tiny_pipeline(family="sd2-depth")
    given = beside(family_of(pipeline), wide, 64)
    assert given["strength"] == 1.0 and given["image"].size == (64, 64)
    assert (np.asarray(given["image"])[..., 0] == 255).all()
    made = pipeline.prepare_depth_map(
        given["image"], given["depth_map"], 1, False, torch.float32, torch.device("cpu")
    )
    content = wide.with_suffix(".depth.png").read_bytes()
    trained = depth_latent(content, (64, 64), (0.25, 0.0, 0.75, 1.0))
    torch.testing.assert_close(made[0], trained.float(), atol=2e-3, rtol=0)


def test_an_inpainting_pipeline_gets_the_middle_of_picture_and_mask(wide):
    given = beside(INPAINTING, wide, 64)
    assert given["image"].size == (given["width"], given["height"]) == (64, 64)
    mask = np.asarray(given["mask_image"])
    assert (mask[:, :32] == 0).all() and (mask[:, 32:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P"])
def test_8_bit_maps_and_coloured_ones_are_read_as_grey(wide, mode):
    Image.linear_gradient("L").convert(mode).save(wide.with_suffix(".depth.png"))
    depth = beside(DEPTH, wide, 64)["depth_map"]
    assert depth.shape == (1, 8, 8) and depth.dtype == torch.float32
    assert float(depth.min()) < 40 and float(depth.max()) > 215


def test_a_picture_lying_on_its_side_is_turned_up(wide):
    upright = Image.open(wide)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(wide, exif=exif)
    image = beside(INPAINTING, wide, 64)["image"]
    assert (np.asarray(image)[..., 0] == 255).all()


def test_masks_are_opened_as_those_of_the_loss_are(wide):
    """All of 16 bits, and black where transparent."""
    across, _ = np.meshgrid(np.arange(128), np.arange(64))
    Image.fromarray((across * 512).astype(np.uint16)).save(wide.with_suffix(".mask.png"))
    mask = np.asarray(beside(INPAINTING, wide, 64)["mask_image"])
    assert mask[0, 0] in (63, 64, 65) and mask[0, 32] in (127, 128, 129)
    clear = Image.new("RGBA", (128, 64), (255, 255, 255, 0))
    clear.save(wide.with_suffix(".mask.png"))
    assert np.asarray(beside(INPAINTING, wide, 64)["mask_image"]).max() == 0


def test_a_loaded_pipeline_is_of_the_family_of_its_parts():
    assert family_of(tiny_pipeline(family="sd15")) == Family(1, 4)
    assert family_of(tiny_pipeline(family="sd2-depth")) == DEPTH
