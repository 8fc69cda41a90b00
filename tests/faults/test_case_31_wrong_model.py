"""Case 31: a wrong model folder (a part missing, empty or torn, or another family) -> the run says
what is missing or what it is instead, before anything heavy is imported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.light import complaint
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "missing parts are looked for", "train/inspection.py", "    if missing:\n", "    if 0:\n"
    ),
    Removal(
        "the header of every file of weights is read",
        "train/inspection.py",
        "read_header(file)",
        "pass",
    ),
    Removal(
        "model_index.json is asked which pipeline it is",
        "train/inspection.py",
        '    check_pipeline(path, index.get("_class_name"))\n',
        "",
    ),
    Removal(
        "parts of different models are told by their widths",
        "train/families.py",
        "if width != text_width:",
        "if False:",
    ),
    Removal(
        "a UNet of another family is told by its configuration",
        "train/families.py",
        "    other = _other(unet, channels)\n",
        "    other = None\n",
    ),
]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def without_vae(base):
    shutil.rmtree(base / "vae")


def without_weights(base):
    (base / WEIGHTS).unlink()


def empty(base):
    (base / WEIGHTS).write_bytes(b"")


def torn(base):
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content[: len(content) // 2])


def a_pointer(base):
    (base / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def an_empty_configuration(base):
    (base / "scheduler/scheduler_config.json").write_text("")


def another_text_encoder(base):
    _change(base / "text_encoder/config.json", hidden_size=768)


def stable_diffusion_xl(base):
    _change(base / "model_index.json", _class_name="StableDiffusionXLPipeline")
    shutil.copytree(base / "text_encoder", base / "text_encoder_2")
    shutil.copytree(base / "tokenizer", base / "tokenizer_2")


def stable_diffusion_3(base):
    _change(base / "model_index.json", _class_name="StableDiffusion3Pipeline")
    (base / "unet").rename(base / "transformer")


def the_unet_of_xl(base):
    _change(base / "unet/config.json", addition_embed_type="text_time")


def _change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_vae, ["lacks vae", "a complete base has"]),
        (without_weights, ["unet/ has no diffusion_pytorch_model.safetensors", "again"]),
        (empty, [WEIGHTS]),
        (torn, [WEIGHTS]),
        (a_pointer, [WEIGHTS]),
        (an_empty_configuration, ["scheduler/scheduler_config.json cannot be read as JSON"]),
        (another_text_encoder, ["parts of different models", "768"]),
        (stable_diffusion_xl, ["is Stable Diffusion XL", "this trains Stable Diffusion 1 and 2"]),
        (stable_diffusion_3, ["is Stable Diffusion 3", "this trains Stable Diffusion 1 and 2"]),
        (the_unet_of_xl, ["is Stable Diffusion XL"]),
    ],
)
def test_a_wrong_folder_is_told(world, tmp_path, spoil, said):
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    spoil(base)
    error = complaint("train/lora.py", *arguments(world, tmp_path / "run", f"model.path={base}"))
    assert str(base) in error and all(text in error for text in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "is Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "is Flux"),
        ("model.diffusion_model.label_emb.0.0.weight", "is Stable Diffusion XL"),
    ],
)
def test_a_wrong_file_is_told(world, tmp_path, name, said):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(4, 4)}, file)
    error = complaint("train/lora.py", *arguments(world, tmp_path / "run", f"model.path={file}"))
    assert str(file) in error and said in error
    assert not (tmp_path / "run").exists()


def test_no_folder_at_all_is_told(world, tmp_path):
    nowhere = tmp_path / "nowhere"
    error = complaint("train/lora.py", *arguments(world, tmp_path / "run", f"model.path={nowhere}"))
    assert f"model.path={nowhere}: no such folder" in error
