"""A merged pipeline is the pipeline with its adapters, without them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_pipeline
from train import adapter_file, adapters, export, merging
from train.config import LoraConfig, ModelConfig, TextLoraConfig, UserError
from train.models import load_pipeline

FILE = "pytorch_lora_weights.safetensors"
PARTS = ("unet", "text_encoder", "vae")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and adapters of every kind of layer that change its pictures."""
    world = tmp_path_factory.mktemp("world")
    tiny_pipeline().save_pretrained(world / "base")
    for seed, (name, how) in enumerate(
        {
            "lora": {"rank": 2, "alpha": 3, "blocks": {"mid_block": 4}},
            "dora": {"rank": 3, "alpha": 1, "dora": True},
            "stable": {"rank": 4, "alpha": 2, "rank_stabilised": True},
        }.items()
    ):
        write_lora(world / name, seed, **how)
    save_file({"<owl>": 0.1 * torch.randn(2, 32)}, world / "learned_embeds.safetensors")
    return world


def write_lora(folder, seed, **how):
    pipeline = tiny_pipeline()
    text = TextLoraConfig(rank=2, alpha=1, targets=["attention", "feed_forward"])
    config = LoraConfig(targets=list(adapters.TARGETS), text_encoder=text, **how)
    adapters.attach(pipeline, config, seed=seed)
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in sum(adapters.named_parameters(pipeline).values(), []):
        size = 0.05 * (parameter.abs().mean() if "magnitude" in name else 1)
        parameter.data += size * torch.randn(parameter.shape, generator=noise)
    folder.mkdir()
    export.save_lora(pipeline, folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")


def with_adapters(world, named):
    pipeline = load_pipeline(str(world / "base"))
    adapter_file.apply(pipeline, [adapter_file.find(text) for text in named])
    return pipeline


def merged(world, folder, named, dtype=torch.float32):
    merging.merged_folder(ModelConfig(path=str(world / "base")), named, folder, dtype)
    return load_pipeline(str(folder), dtype=dtype)


def picture(pipeline, prompt="a star"):
    generator = torch.Generator().manual_seed(0)
    how = {"width": 64, "height": 64, "num_inference_steps": 4, "output_type": "np"}
    return pipeline(prompt, generator=generator, **how).images[0] * 255


@pytest.fixture(scope="module")
def plain(world):
    """The base's picture."""
    return picture(with_adapters(world, []))


SETS = {
    "at a scale": ["lora:-0.5"],
    "DoRA": ["dora"],
    "several": ["lora:0.8", "stable:0.3"],
    "DoRA behind another": ["lora:0.8", "dora:0.6"],
    "DoRA before another": ["dora:0.6", "lora:0.8"],
}


@pytest.mark.parametrize("named", SETS.values(), ids=SETS)
def test_its_pictures_are_those_with_the_adapters_beside_the_base(world, plain, tmp_path, named):
    named = [str(world / name) for name in named]
    expected = picture(with_adapters(world, named))
    found = picture(merged(world, tmp_path / "merged", named))
    assert np.abs(found - expected).max() < 0.05  # of 255; 2 are allowed
    assert np.abs(expected - plain).max() > 5


def test_it_is_a_plain_folder_of_the_base_s_form(world, tmp_path):
    pipeline = merged(world, tmp_path / "merged", [str(world / "lora")])
    base = load_pipeline(str(world / "base"))
    for part in PARTS:
        found, before = (getattr(p, part).state_dict() for p in (pipeline, base))
        assert found.keys() == before.keys()
        assert {t.dtype for t in found.values()} == {torch.float32}
        moved = [name for name in found if not torch.equal(found[name], before[name])]
        assert moved if part != "vae" else not moved
    files = [file.name for file in (tmp_path / "merged").rglob("*")]
    assert not [name for name in files if "lora" in name or "adapter" in name]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_the_sum_is_that_of_the_factors(world, tmp_path):
    """Two adapters' factors, multiplied out by hand, in a convolution and the text encoder."""
    named = [f"{world / 'lora'}:0.8", f"{world / 'stable'}:0.3"]
    pipeline = merged(world, tmp_path / "merged", named)
    base = load_pipeline(str(world / "base"))
    for part, layer, scales in (
        ("unet", "down_blocks.0.resnets.0.conv1", (0.8 * 3 / 2, 0.3 * 2 / 4**0.5)),
        ("text_encoder", "encoder.layers.1.self_attn.q_proj", (0.8 * 1 / 2, 0.3 * 1 / 2**0.5)),
    ):
        expected = getattr(base, part).get_submodule(layer).weight.detach().clone()
        for name, scale in zip(("lora", "stable"), scales, strict=True):
            tensors = load_file(world / name / FILE)
            path = f"{part}.{'text_model.' if part == 'text_encoder' else ''}{layer}"
            down, up = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
            expected += scale * (up.flatten(1) @ down.flatten(1)).reshape(expected.shape)
        found = getattr(pipeline, part).get_submodule(layer).weight
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_is_stored_in_less_is_the_fp32_sum_rounded_once(world, tmp_path):
    named = [f"{world / 'lora'}:0.8", str(world / "dora")]
    whole = merged(world, tmp_path / "whole", named)
    for dtype in (torch.float16, torch.bfloat16):
        half = merged(world, tmp_path / str(dtype), named, dtype)
        for part in PARTS:
            found, expected = (getattr(p, part).state_dict() for p in (half, whole))
            assert all(torch.equal(found[name], expected[name].to(dtype)) for name in found)


def test_a_pipeline_in_half_precision_is_added_to_in_fp32(world):
    named = [f"{world / name}:0.01" for name in ("lora", "stable")]
    pipeline = with_adapters(world, named).to(torch.bfloat16)
    layer = "mid_block.attentions.0.proj_in"
    adapted = pipeline.unet.get_submodule(layer)
    total = adapted.base_layer.weight.float()
    for name in adapted.active_adapters:
        down, up = (getattr(adapted, f"lora_{side}")[name].weight.float() for side in "AB")
        total = total + adapted.scaling[name] * up @ down
    merging.fuse(pipeline)
    found = pipeline.unet.get_submodule(layer).weight
    assert found.dtype == torch.bfloat16 and torch.equal(found, total.bfloat16())


def test_new_words_are_known_without_their_file(world, tmp_path):
    named = [str(world / "learned_embeds.safetensors"), str(world / "lora")]
    expected = picture(with_adapters(world, named), "a <owl>")
    pipeline = merged(world, tmp_path / "merged", named)
    assert np.abs(picture(pipeline, "a <owl>") - expected).max() < 0.05
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<owl>", "<owl>_1"])
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows, load_file(world / "learned_embeds.safetensors")["<owl>"])
    settings = json.loads((tmp_path / "merged/text_encoder/config.json").read_text())
    assert settings["vocab_size"] == len(pipeline.tokenizer)


def test_the_scheduler_is_the_one_that_they_were_trained_with(world, tmp_path):
    write_lora(tmp_path / "zero", 5, rank=2)
    edit(tmp_path / "zero/scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    scheduler = merged(world, tmp_path / "merged", [str(tmp_path / "zero")]).scheduler.config
    assert scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing == "trailing"
    assert scheduler.prediction_type == "v_prediction"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", ["sd2-depth", "sd2-inpainting", "sd15"])
def test_the_other_families_are_merged_too(tmp_path, family):
    base = tiny_pipeline(family=family)
    base.save_pretrained(tmp_path / "base")
    adapters.attach(base, LoraConfig(rank=2, targets=list(adapters.TARGETS)), seed=0)
    for _, parameter in adapters.named_parameters(base)["unet"]:
        parameter.data.normal_(std=0.1)
    (tmp_path / "lora").mkdir()
    export.save_lora(base, tmp_path / "lora")
    pipeline = merged(tmp_path, tmp_path / "merged", [str(tmp_path / "lora")])
    assert type(pipeline) is type(base)
    latents = torch.randn(1, base.unet.config.in_channels, 8, 8)
    seen = (latents, torch.tensor([3]), torch.randn(1, 77, 32))
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(*seen)[0], base.unet(*seen)[0])


# What cannot be merged


def refused(world, tmp_path, named, dtype=torch.float32, output="merged"):
    with pytest.raises(UserError) as caught:
        merged(world, tmp_path / output, named, dtype)
    return str(caught.value)


def broken(world, tmp_path, value):
    tensors = load_file(world / "lora" / FILE)
    key = next(iter(tensors))
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, tmp_path / "broken.safetensors")
    return str(tmp_path / "broken.safetensors"), key


def test_numbers_that_are_not_finite_are_named(world, tmp_path):
    file, key = broken(world, tmp_path, float("nan"))
    message = refused(world, tmp_path, [file])
    assert f"adapters={file} is not finite in {key}" in message
    file, _ = broken(world, tmp_path, 3e38)
    assert "lower the scale" in refused(world, tmp_path, [f"{file}:1e30"])
    file, _ = broken(world, tmp_path, 1e8)
    assert "does not fit float16" in refused(world, tmp_path, [file], torch.float16)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_named_before_the_base_is_loaded(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr("train.models.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    odd = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    save_file({odd: torch.zeros(2, 768)}, tmp_path / "sd15.safetensors")
    message = refused(world, tmp_path, [str(tmp_path / "sd15.safetensors")])
    assert "adapter of Stable Diffusion 1" in message


def test_a_folder_that_holds_something_is_left_alone(world, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    assert "is not an empty folder" in refused(world, tmp_path, [str(world / "lora")])
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"
