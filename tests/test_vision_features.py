import json

import numpy as np
import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from eval.features import load_extractor
from eval.resizing import clean
from train.config import UserError

LAYERS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**LAYERS, intermediate_size=32, image_size=32, patch_size=8)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**LAYERS, image_size=42, patch_size=8)),
    "registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**LAYERS, image_size=42, patch_size=8, num_register_tokens=2)
    ),
}
# As the published folders have them: of the first DINO, and of DINOv2.
OLD = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}
NEW = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 40},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SCALE = {"do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD}


def save(folder, kind: str, **processor):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    content = (OLD if kind == "vit" else NEW) | SCALE | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return model


def picture(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scaled(pixels: np.ndarray, side: int) -> torch.Tensor:
    unit = torch.from_numpy(clean(pixels, side)).permute(2, 0, 1) / 255
    return ((unit - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


@pytest.mark.parametrize("kind", MODELS)
def test_the_feature_is_the_normalised_class_token(kind, tmp_path):
    model = save(tmp_path, kind)
    with torch.no_grad():
        tokens = model(scaled(picture(), 32)).last_hidden_state  # after the last normalisation
    extractor = load_extractor(tmp_path)
    found = extractor.images([picture()])
    assert found.shape == (1, 24) == (1, extractor.dimension) and found.dtype == np.float64
    np.testing.assert_allclose(found[0], tokens[0, 0].numpy(), atol=1e-5)
    assert extractor.resize == "clean bicubic, squashed to 32x32"
    assert not hasattr(extractor, "texts")


def test_of_dinov2_that_is_its_pooled_output(tmp_path):
    model = save(tmp_path, "dinov2")
    with torch.no_grad():
        pooled = model(scaled(picture(), 32)).pooler_output
    np.testing.assert_allclose(
        load_extractor(tmp_path).images([picture()]), pooled.numpy(), atol=1e-5
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_has_the_same_bits_whatever_else_is_embedded(kind, tmp_path):
    save(tmp_path, kind)
    embed, order = load_extractor(tmp_path).images, [3, 0, 4, 2, 1]
    pictures = [picture(30 + 9 * k, 40) for k in range(5)]
    whole = embed(pictures)
    assert (whole == np.concatenate([embed([one]) for one in pictures])).all()
    assert (whole == np.concatenate([embed(pictures[:3]), embed(pictures[3:])])).all()
    assert (whole[order] == embed([pictures[k] for k in order])).all()


def test_a_vit_can_read_another_size_than_it_was_trained_with(tmp_path):
    model = save(tmp_path, "vit", size=48)
    with torch.no_grad():
        out = model(scaled(picture(), 48), interpolate_pos_encoding=True).last_hidden_state
    found = load_extractor(tmp_path).images([picture()])
    np.testing.assert_allclose(found[0], out[0, 0].numpy(), atol=1e-5)


def test_pixels_that_are_not_to_be_normalised_are_not(tmp_path):
    model = save(tmp_path, "vit", do_normalize=False)
    with torch.no_grad():
        unit = torch.from_numpy(clean(picture(), 32)).permute(2, 0, 1)[None] / 255
        out = model(unit).last_hidden_state
    found = load_extractor(tmp_path).images([picture()])
    np.testing.assert_allclose(found[0], out[0, 0].numpy(), atol=1e-5)


def test_weights_as_the_first_dino_was_published_serve_too(tmp_path):
    model = save(tmp_path, "vit")
    whole = load_extractor(tmp_path).images([picture()])
    bare = {k: v for k, v in model.state_dict().items() if not k.startswith("pooler.")}
    torch.save(bare, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert (load_extractor(tmp_path).images([picture()]) == whole).all()


def test_a_classifier_serves_by_its_body(tmp_path):
    save(tmp_path, "vit")
    config = ViTConfig(**LAYERS, intermediate_size=32, image_size=32, patch_size=8)
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        token = model.vit(scaled(picture(), 32)).last_hidden_state[0, 0]
    np.testing.assert_allclose(
        load_extractor(tmp_path).images([picture()])[0], token.numpy(), atol=1e-5
    )


def test_a_processor_without_a_square_is_refused(tmp_path):
    save(tmp_path, "vit", size={"height": 32, "width": 64})
    with pytest.raises(UserError, match="preprocessor_config.json names no square"):
        load_extractor(tmp_path)
