"""The arithmetic of a run, against what is known of Stable Diffusion 2.1, and cards' peaks."""

import pytest

from train import flops
from train.architecture import Architecture
from train.config import FullRun, LoraRun, ModelConfig, TextualInversionRun, load

TERA = 1e12


@pytest.fixture(scope="module")
def work():
    base = Architecture.of(ModelConfig(path="nobody/has-this"))
    assert "assumed" in base.described
    return {side: flops.count(base, (side, side)) for side in (512, 768)}


@pytest.mark.parametrize(
    ("side", "unet", "encode", "decode"), [(512, 0.80, 1.12, 2.51), (768, 2.15, 2.61, 5.75)]
)
def test_the_published_costs_of_sd_2_1(work, side, unet, encode, decode):
    found = work[side]
    parts = found.unet, found.vae_encode, found.vae_decode
    assert [round(part / TERA, 2) for part in parts] == [unet, encode, decode]


@pytest.mark.parametrize(
    ("schema", "overrides", "unet", "text", "again"),
    [
        (LoraRun, [], 2, 0, 0),
        (LoraRun, ["lora.text_encoder={}"], 2, 2, 0),
        (LoraRun, ["train.gradient_checkpointing=true"], 2, 0, 1),
        (LoraRun, ["data.captions.shuffle_tags=true"], 2, 1, 0),
        (LoraRun, ["data.captions={shuffle_tags: true, replace: 'a, b'}"], 2, 0, 0),
        (LoraRun, ["data.captions.templates=object"], 2, 1, 0),
        (LoraRun, ["data.captions.templates=['a {}', 'the {}']"], 2, 0, 0),
        (LoraRun, ["data.captions.wildcards=true"], 2, 1, 0),
        (LoraRun, ["data.captions={tag_dropout: 0.1, keep_tags: 3, separator: ' | '}"], 2, 1, 0),
        (FullRun, [], 3, 0, 0),
        (FullRun, ["full.text_encoder=true"], 3, 3, 0),
        (TextualInversionRun, ["textual_inversion.tokens=[{token: a, initial: b}]"], 2, 2, 0),
    ],
)
def test_a_step_is_forward_passes_by_what_trains(work, schema, overrides, unet, text, again):
    config = load(schema, ["output=x", "data.path=y", *overrides])
    found, one = flops.per_picture(config, work[768]), work[768]
    assert found.model == unet * one.unet + text * one.text_encoder
    assert found.again == again * one.unet


def test_the_floors_of_a_step_at_768_pixels(work):
    for schema, floor in ((LoraRun, 4.30), (FullRun, 6.45)):
        config = load(schema, ["output=x", "data.path=y"])
        assert round(flops.per_picture(config, work[768]).model / TERA, 2) == floor


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H200", "no", 66.9),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "fp16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "fp16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("cpu", "no", None),
    ],
)
def test_peaks_of_cards(name, precision, tflops):
    found = flops.peak_flops(name, precision)
    assert found == (tflops and tflops * TERA)


def test_tf32_counts_in_fp32_alone():
    assert flops.peak_flops("NVIDIA H200", "no", tf32=True) == 494.7 * TERA
    assert flops.peak_flops("NVIDIA H200", "bf16", tf32=True) == 989.4 * TERA
    assert flops.peak_flops("Tesla V100-SXM2-16GB", "no", tf32=True) == 15.7 * TERA
