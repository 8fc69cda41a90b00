"""Whole models as single files in LDM's layout, against the layout's rules, an independent
converter (tests/ldm.py) and diffusers' own reader."""

import hashlib
import json
import math
import shutil

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.toy import random_base
from tests.ldm import to_ldm
from tests.published_layout import clip_layout, open_clip_layout, unet_layout, vae_layout
from tests.runs import ROOT, arguments, make_world
from tests.tiny import tiny_pipeline
from train import full, ldm, ldm_names, ldm_settings
from train.config import UserError
from train.families import BaseModel, Family
from train.models import load_pipeline

UNET, VAE, TEXT, CLIP = ldm_names.UNET, ldm_names.VAE, ldm_names.OPEN_CLIP, ldm_names.CLIP
PARTS = ("unet", "vae", "text_encoder")
EXTRA = {"betas", "alphas_cumprod", "alphas_cumprod_prev"}
EXTRA |= {"sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}


# The real sizes


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def described(folder, unet=None, text=None):
    """The JSON of a model of the full size: SD 2.1's but for `unet` and `text`."""
    settings = {
        "unet": random_base.UNET | (unet or {}),
        "vae": random_base.VAE,
        "text_encoder": random_base.TEXT_ENCODER | (text or {}),
    }
    for part, content in settings.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(content))
    return folder


def counted(shapes, prefix):
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


@pytest.mark.parametrize("channels", [4, 5, 9])
def test_sd_2_of_the_real_size_has_the_published_names_and_shapes(tmp_path, channels):
    found = ldm.layout(described(tmp_path, {"in_channels": channels}))
    assert found == {
        **prefixed(UNET, unet_layout(1024, (), channels)),
        **prefixed(VAE, vae_layout()),
        **prefixed(TEXT, open_clip_layout()),
    }
    assert counted(found, UNET) == 865_910_724 + (channels - 4) * 320 * 9
    assert counted(found, VAE) == 83_653_863
    unused = 12_596_224 + 1024**2 + 1  # the last layer, the projection, the logit scale
    assert counted(found, TEXT) == 340_387_840 + unused


def test_sd_15_of_the_real_size_has_the_published_names_and_shapes(tmp_path):
    unet = {"cross_attention_dim": 768, "attention_head_dim": 8, "use_linear_projection": False}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
    found = ldm.layout(described(tmp_path, unet, text))
    assert found == {
        **prefixed(UNET, unet_layout(768, (1, 1))),
        **prefixed(VAE, vae_layout()),
        **prefixed(f"{CLIP}text_model.", clip_layout()),
    }
    assert counted(found, UNET) == 859_520_964
    assert counted(found, CLIP) == 123_060_480 + 77
    assert len([name for name in found if name.startswith(UNET)]) == 686


# Tiny models, there and back


def deeper():
    """SD 2's four blocks of two layers, the last without attention; and a VAE of three blocks."""
    pipeline = tiny_pipeline()
    pipeline.vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline.unet = UNet2DConditionModel(
        **random_base.UNET
        | {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": (1, 2, 2, 2)}
        | {"cross_attention_dim": 32, "norm_num_groups": 4, "sample_size": 8}
    )
    return pipeline


MODELS = {
    "deeper": deeper,
    **{
        family: (lambda family=family: tiny_pipeline(family=family))
        for family in ("sd21", "sd2-depth", "sd2-inpainting", "sd15")
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model, no two of its weights alike."""
    made = tmp_path_factory.mktemp("folders")
    for name, make in MODELS.items():
        pipeline = make()
        for part in PARTS:
            for parameter in getattr(pipeline, part).parameters():
                parameter.data.normal_()
        pipeline.save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def files(folders):
    for name in MODELS:
        ldm.to_single_file(folders / name, folders / f"{name}.safetensors", metadata={"a": "b"})
    return folders


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_same(pipeline, expected):
    for part in PARTS:
        found, wanted = (getattr(p, part).state_dict() for p in (pipeline, expected))
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_is_the_same(files, name):
    file, folder = files / f"{name}.safetensors", files / name
    expected = load_pipeline(str(folder))
    assert_same(load_pipeline(str(file), config=str(folder)), expected)
    if name not in ("sd2-depth", "sd2-inpainting"):
        without = {"safety_checker": None, "feature_extractor": None}
        assert_same(
            StableDiffusionPipeline.from_single_file(str(file), config=str(folder), **without),
            expected,
        )
    back, wanted = ldm.parts_of_file(file, folder), ldm.parts_of_folder(folder)
    for part in PARTS:
        assert back[part].keys() == wanted[part].keys()
        for key, stored in wanted[part].items():
            assert same_bits(back[part][key].read(), stored.read()), key


@pytest.mark.parametrize("name", ["sd21", "sd2-depth"])
def test_the_tensors_are_those_of_a_converter_that_was_written_apart(files, name):
    found, wanted = load_file(files / f"{name}.safetensors"), to_ldm(files / name)
    assert found.keys() - EXTRA == wanted.keys()
    assert [k for k in wanted if k not in _MADE and not same_bits(found[k], wanted[k])] == []


_MADE = {f"{TEXT}logit_scale"}  # by convention


def test_sd_1_s_text_encoder_is_clip_s_with_numbered_positions(files):
    found = load_file(files / "sd15.safetensors")
    wanted = load_file(files / "sd15/text_encoder/model.safetensors")
    names = {f"{CLIP}text_model.{k.removeprefix('text_model.')}": k for k in wanted}
    ids = f"{CLIP}text_model.embeddings.position_ids"
    assert {k for k in found if k.startswith("cond_stage")} == {*names, ids}
    assert all(same_bits(found[ours], wanted[k]) for ours, k in names.items())
    assert torch.equal(found[ids], torch.arange(77)[None])


def test_shards_and_the_names_of_early_diffusers_make_the_same_file(files, tmp_path):
    folder = shutil.copytree(files / "sd21", tmp_path / "early")
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_pretrained(files / "sd21" / "unet").save_pretrained(
        folder / "unet", max_shard_size="500KB"
    )
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    vae, text = (folder / "vae/diffusion_pytorch_model", folder / "text_encoder/model")
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rewrite(vae, lambda k: _replaced(k, renamed))
    rewrite(text, lambda k: f"text_model.{k.removeprefix('text_model.')}")
    ldm.to_single_file(folder, tmp_path / "sd21.safetensors", metadata={"a": "b"})
    early, today = (f / "sd21.safetensors" for f in (tmp_path, files))
    assert early.read_bytes() == today.read_bytes()


def _replaced(name, pairs):
    for old, new in pairs.items():
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name


def rewrite(path, name=lambda key: key, drop=(), **changes):
    file = path.with_name(f"{path.name}.safetensors")
    tensors = {name(k): v for k, v in load_file(file).items() if k not in drop}
    save_file(tensors | changes, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_is_the_one_asked_for(files, tmp_path, dtype):
    ldm.to_single_file(files / "sd15", tmp_path / "half.safetensors", dtype=dtype)
    half, whole = load_file(tmp_path / "half.safetensors"), load_file(files / "sd15.safetensors")
    for name, tensor in whole.items():
        kept = name in EXTRA or tensor.dtype == torch.int64
        assert same_bits(half[name], tensor if kept else tensor.to(dtype)), name
    loaded = load_pipeline(
        str(tmp_path / "half.safetensors"), config=str(files / "sd15"), dtype=dtype
    )
    assert_same(loaded, load_pipeline(str(files / "sd15"), dtype=dtype))


def test_our_own_trained_model_goes_round(tmp_path):
    world = make_world(tmp_path / "world")
    tiny = arguments(world, tmp_path / "run", "train.steps=1", "optim.warmup_steps=0")
    settings = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())
    del settings["lora"]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(settings))
    full.main([f"--config={tmp_path / 'full.yaml'}", *tiny[1:], "preview.every=0"])
    trained, file = tmp_path / "run" / "full", tmp_path / "trained.safetensors"
    ldm.to_single_file(trained, file)
    loaded = StableDiffusionPipeline.from_single_file(str(file), config=str(trained))
    assert_same(loaded, load_pipeline(str(trained)))


# What a folder does not have


def test_what_sd_2_does_not_use_is_the_source_s_or_made(files, tmp_path):
    made = load_file(files / "sd2-depth.safetensors")
    layer = f"{TEXT}transformer.resblocks."
    for name in (k for k in made if k.startswith(f"{layer}2.")):
        assert same_bits(made[name], made[name.replace(f"{layer}2.", f"{layer}1.")])
    assert torch.equal(made[f"{TEXT}text_projection"], torch.eye(32))
    assert made[f"{TEXT}logit_scale"] == pytest.approx(math.log(100))
    own = {k: torch.randn_like(v) for k, v in made.items() if k.startswith(f"{layer}2.")}
    own |= {f"{TEXT}text_projection": torch.randn(32, 32), f"{TEXT}logit_scale": torch.tensor(4.0)}
    own |= {"depth_model.model.pretrained.model.norm.bias": torch.randn(3)}
    source = made | own | {f"{UNET}out.2.bias": torch.full((4,), 9.0), "odd": torch.ones(1)}
    save_file(source, tmp_path / "source.safetensors")
    output = tmp_path / "kept.safetensors"
    ldm.to_single_file(files / "sd2-depth", output, source=tmp_path / "source.safetensors")
    kept = load_file(output)
    assert kept.keys() == made.keys() | own.keys()
    assert all(same_bits(kept[k], own.get(k, made.get(k))) for k in kept)


def test_words_beyond_the_layout_s_table_are_left_out_and_said(files, tmp_path, monkeypatch):
    rows = json.loads((files / "sd21/text_encoder/config.json").read_text())["vocab_size"]
    monkeypatch.setattr(ldm, "WORDS", rows - 2)
    notes = ldm.to_single_file(files / "sd21", tmp_path / "a.safetensors")
    assert any("2 new words are not in the file" in note for note in notes)
    table = load_file(tmp_path / "a.safetensors")[f"{TEXT}token_embedding.weight"]
    whole = load_file(files / "sd21.safetensors")[f"{TEXT}token_embedding.weight"]
    assert torch.equal(table, whole[: rows - 2])


# What the file says of itself


def test_the_header_says_what_it_is_and_the_hash_is_true(files):
    content = (files / "sd21.safetensors").read_bytes()
    with safe_open(str(files / "sd21.safetensors"), "pt") as file:
        about = file.metadata()
    after = content[8 + int.from_bytes(content[:8], "little") :]
    assert about.pop("modelspec.hash_sha256") == "0x" + hashlib.sha256(after).hexdigest()
    assert about == {
        "a": "b",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "sd21",
        "modelspec.prediction_type": "v",
    }
    with safe_open(str(files / "sd15.safetensors"), "pt") as file:
        about = file.metadata()
    assert about["modelspec.architecture"] == "stable-diffusion-v1"
    assert about["modelspec.resolution"] == "64x64"


def test_the_schedule_is_that_of_the_folder(files, tmp_path):
    found = load_file(files / "sd21.safetensors")
    scheduler = load_pipeline(str(files / "sd21")).scheduler
    torch.testing.assert_close(found["alphas_cumprod"], scheduler.alphas_cumprod)
    torch.testing.assert_close(found["betas"], scheduler.betas)
    folder = shutil.copytree(files / "sd21", tmp_path / "zero")
    edit(folder / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    notes = ldm.to_single_file(folder, tmp_path / "zero.safetensors")
    assert any("ModelSamplingDiscrete with zsnr" in note for note in notes)
    zero = load_file(tmp_path / "zero.safetensors")
    assert zero["alphas_cumprod"][-1] == 2**-24
    assert all(zero[name].isfinite().all() for name in EXTRA)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "target", "parameterization"),
    [
        ("sd21", "LatentDiffusion", "v"),
        ("sd2-inpainting", "LatentInpaintDiffusion", "eps"),
        ("sd2-depth", "LatentDepth2ImageDiffusion", "eps"),
    ],
)
def test_the_configuration_beside_sd_2_says_what_web_uis_would_guess(
    files, name, target, parameterization
):
    model = yaml.safe_load((files / f"{name}.yaml").read_text())["model"]
    assert model["target"].endswith(f".{target}")
    assert model["params"]["parameterization"] == parameterization
    unet = model["params"]["unet_config"]["params"]
    assert unet["in_channels"] == {"sd2-inpainting": 9, "sd2-depth": 5}.get(name, 4)
    assert ("depth_stage_config" in model["params"]) == (name == "sd2-depth")


def test_the_configuration_of_the_real_size_is_the_published_one(tmp_path):
    folder = described(tmp_path)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text('{"beta_start": 0.00085}')
    base = BaseModel("x", "diffusers folder", Family(2, 4), "v_prediction", 768)
    model = ldm_settings.configuration(folder, base)["model"]["params"]
    unet, vae = (model[f"{p}_config"]["params"] for p in ("unet", "first_stage"))
    assert (model["image_size"], model["scale_factor"]) == (96, 0.18215)
    assert (unet["model_channels"], unet["channel_mult"]) == (320, [1, 2, 4, 4])
    assert (unet["num_head_channels"], unet["attention_resolutions"]) == (64, [4, 2, 1])
    assert (unet["context_dim"], unet["num_res_blocks"]) == (1024, 2)
    assert (vae["ddconfig"]["ch"], vae["ddconfig"]["ch_mult"]) == (128, [1, 2, 4, 4])


def test_sd_1_needs_none_and_that_of_another_model_is_taken_away(files, tmp_path):
    assert not (files / "sd15.yaml").exists()
    (tmp_path / "a.yaml").write_text("of another")
    ldm.to_single_file(files / "sd15", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.yaml").exists()


@pytest.mark.parametrize(("spread", "guessed_wrong"), [(0.08, True), (0.2, False)])
def test_what_comfyui_will_guess_wrong_is_said(folders, tmp_path, spread, guessed_wrong):
    folder = shutil.copytree(folders / "deeper", tmp_path / "model")
    key = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    rewrite(
        folder / "unet/diffusion_pytorch_model", **{key: spread * torch.tensor([1.0, -1.0] * 4)}
    )
    notes = ldm.to_single_file(folder, tmp_path / "a.safetensors")
    assert any("ModelSamplingDiscrete with v_prediction" in n for n in notes) == guessed_wrong


# What has no place in the layout


def refused(folder, tmp_path, **how):
    with pytest.raises(UserError) as caught:
        ldm.to_single_file(folder, tmp_path / "a.safetensors", **how)
    assert not (tmp_path / "a.safetensors").exists()
    return str(caught.value)


def test_a_folder_with_a_tensor_too_few_or_of_another_shape_is_named(folders, tmp_path):
    for name, how in (("less", {"drop": {"conv_out.bias"}}), ("odd", {})):
        folder = shutil.copytree(folders / "sd21", tmp_path / name)
        odd = {} if how else {"conv_out.bias": torch.zeros(9)}
        rewrite(folder / "unet/diffusion_pytorch_model", **how, **odd)
        message = refused(folder, tmp_path)
        assert str(folder / "unet") in message and "conv_out.bias" in message


def test_other_blocks_and_other_depths_are_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders / "sd21", tmp_path / "model")
    edit(folder / "text_encoder/config.json", num_hidden_layers=24)
    assert "has 24 layers" in refused(folder, tmp_path)
    edit(folder / "vae/config.json", down_block_types=["AttnDownEncoderBlock2D"] * 4)
    assert "no names" in refused(folder, tmp_path)


def test_a_weight_that_is_not_finite_is_named(folders, tmp_path):
    folder = shutil.copytree(folders / "sd21", tmp_path / "model")
    bias = torch.tensor([0.0, 1.0, float("nan"), 0.0])
    rewrite(folder / "unet/diffusion_pytorch_model", **{"conv_out.bias": bias})
    assert "out.2.bias is not finite" in refused(folder, tmp_path)
    rewrite(folder / "unet/diffusion_pytorch_model", **{"conv_out.bias": bias.nan_to_num(1e6)})
    assert "out.2.bias does not fit into float16" in refused(folder, tmp_path, dtype=torch.float16)
