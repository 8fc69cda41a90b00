import json

import pytest
import torch

from scripts.toy import full_size, random_base
from scripts.toy.architecture import build_tokenizer
from scripts.toy.vocabulary import vocabulary
from tests.tiny import tiny_pipeline
from train.config import ModelConfig, UserError
from train.models import inspect, load_pipeline

TINY_UNET = {
    "block_out_channels": (32, 32, 32, 32),
    "attention_head_dim": (2, 2, 2, 2),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def test_the_parts_have_the_sizes_of_sd_21(tmp_path):
    with torch.device("meta"):
        parts = {
            name: build()
            for name, build in random_base.builders(build_tokenizer(vocabulary(), tmp_path)).items()
        }
    millions = {
        name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()
    }
    assert millions["unet"] == pytest.approx(865.9, abs=0.05)
    assert millions["vae"] == pytest.approx(83.7, abs=0.05)
    assert millions["text_encoder"] == pytest.approx(340.4, abs=0.05)
    assert sum(millions.values()) * 1e6 <= random_base.PARAMETERS
    attention = [n for n, _ in parts["unet"].named_modules() if n.endswith((".to_q", ".to_out.0"))]
    assert len(attention) == 64  # 16 transformers, each with self- and cross-attention


@pytest.fixture
def small(monkeypatch):
    for name, tiny in (("UNET", TINY_UNET), ("VAE", TINY_VAE), ("TEXT_ENCODER", TINY_TEXT)):
        monkeypatch.setattr(random_base, name, getattr(random_base, name) | tiny)
    monkeypatch.setitem(random_base.TEXT_ENCODER, "num_attention_heads", 2)


def test_the_folder_is_a_base_like_any_other(small, tmp_path):
    out = tmp_path / "sd21"
    full_size.main([str(out)])
    base = inspect(ModelConfig(path=str(out)))
    assert (base.prediction_type, base.resolution) == ("v_prediction", 768)
    assert torch.get_default_dtype() == torch.float32
    pipeline = load_pipeline(str(out), dtype=torch.float16)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float16}
    tokenizer, text = pipeline.tokenizer, pipeline.text_encoder.config
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("!", 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        text.bos_token_id,
        text.eos_token_id,
    )
    images = pipeline.to(torch.float32)(
        "a red heart", num_inference_steps=2, height=64, width=64, output_type="np"
    ).images
    assert images.shape == (1, 64, 64, 3) and (images == images).all()


def test_the_scheduler_is_sd_21s(small, tmp_path):
    full_size.main([f"output={tmp_path / 'sd21'}", "dtype=fp32"])
    written = json.loads((tmp_path / "sd21/scheduler/scheduler_config.json").read_text())
    expected = tiny_pipeline().scheduler.config
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "clip_sample"):
        assert written[key] == expected[key], key
    assert (written["set_alpha_to_one"], written["steps_offset"]) == (False, 1)


def test_the_seed_decides_the_weights_and_other_folders_are_left_alone(small, tmp_path):
    files = [tmp_path / name / "unet/diffusion_pytorch_model.safetensors" for name in "abc"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        full_size.main([str(tmp_path / name), f"seed={seed}"])
    a, b, c = (file.read_bytes() for file in files)
    assert a == b and a != c
    with pytest.raises(UserError, match="not an empty folder"):
        full_size.main([str(tmp_path / "a")])
    assert files[0].read_bytes() == a
