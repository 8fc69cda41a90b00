"""A frozen UNet's linear layers in 8 and 4 bits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.runs import arguments, make_world
from tests.tiny import tiny_pipeline
from train import adapters, demands, export, lora, models, quantising
from train.config import (
    ROOT,
    DreamBoothRun,
    FullRun,
    LoraConfig,
    LoraRun,
    TrainConfig,
    UserError,
    load,
)
from train.quantising import Quantised

KINDS = ("int8", "nf4")
EVERYTHING = "lora.targets=[attention,proj,feed_forward,convolution]"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def linear(inputs=96, outputs=64, *, bias=True, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def run(world, output, *overrides):
    lora.main(arguments(world, output, *overrides))
    return load_file(output / "adapter/pytorch_lora_weights.safetensors")


# A layer


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("shape", [(96, 64, True), (96, 64, False), (34, 7, True)])
def test_a_layer_computes_what_a_linear_one_with_the_rounded_weight_does(how, shape):
    inputs, outputs, bias = shape
    plain = linear(inputs, outputs, bias=bias)
    layer = Quantised(plain, how)
    plain.weight.data = layer.weight
    x = torch.randn(2, 5, inputs, requires_grad=True)
    gradients = []
    for one in (plain, layer):
        y = one(x)
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
        assert y.shape == (2, 5, outputs)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("how", "deviation", "size"), [("int8", 0.01, 1.05), ("nf4", 0.1, 0.57)])
def test_how_far_weights_are_rounded_and_how_many_bytes_each_takes(how, deviation, size):
    plain = linear(512, 512)
    layer = Quantised(plain, how)
    rounding = (layer.weight - plain.weight).norm() / plain.weight.norm()
    assert 0 < rounding < deviation
    kept = [layer.codes, layer.scales]
    assert sum(t.nbytes for t in kept) < size * plain.weight.numel()
    assert layer.weight.dtype == torch.float32 and layer.bias is plain.bias


def test_int8_is_exact_where_a_row_fits_its_numbers_and_zeros_stay():
    plain = linear(64, 3)
    plain.weight.data = torch.randint(-127, 128, (3, 64)).float() / 1024
    plain.weight.data[:, 0] = 127 / 1024
    plain.weight.data[1] = 0
    assert torch.equal(Quantised(plain, "int8").weight, plain.weight)


@pytest.mark.parametrize("how", KINDS)
def test_the_backward_pass_keeps_codes_alone(how):
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    layer, x = Quantised(linear(), how), torch.randn(3, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert {t.data_ptr() for t in kept} == {layer.codes.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("how", KINDS)
def test_a_layer_heeds_autocast_and_its_scales_survive_a_cast(how):
    layer = Quantised(linear(), how)
    weight = layer.weight
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight)
    x = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


# A UNet


@pytest.mark.parametrize("how", KINDS)
def test_every_linear_layer_of_the_unet_is_quantised_and_nothing_else(how):
    pipeline = frozen()
    before = {
        name: module.weight.shape
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, nn.Linear)
    }
    models.store_in(pipeline, TrainConfig(quantize=how, mixed_precision="bf16"))
    after = {n: m for n, m in pipeline.unet.named_modules() if isinstance(m, Quantised)}
    assert {name: module.weight.shape for name, module in after.items()} == before
    assert pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert models.fingerprint(pipeline.unet) != models.fingerprint(frozen().unet)
    for part in (pipeline.text_encoder, pipeline.vae):
        assert not any(isinstance(module, Quantised) for module in part.modules())


def frozen():
    pipeline = tiny_pipeline()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


# Rounding of the weights moves what the base predicts, relative to its norm, by this much.
DEVIATIONS = {"int8": (0.001, 0.004), "nf4": (0.02, 0.08)}


@pytest.mark.parametrize("how", KINDS)
def test_what_the_toy_base_predicts_deviates_as_much_as_the_documentation_says(how):
    pipeline = models.load_pipeline(str(ROOT / "data/assets/toy-base"))
    unet = pipeline.unet.requires_grad_(False).eval()
    torch.manual_seed(0)
    latents, timesteps = torch.randn(4, 4, 16, 16), torch.tensor([50, 350, 650, 950])
    text = torch.randn(4, 77, unet.config.cross_attention_dim)
    with torch.no_grad():
        exact = unet(latents, timesteps, encoder_hidden_states=text).sample
        quantising.quantise(unet, how)
        rounded = unet(latents, timesteps, encoder_hidden_states=text).sample
    least, most = DEVIATIONS[how]
    assert least < (rounded - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("how", KINDS)
def test_adapters_off_leave_the_quantised_base(how):
    pipeline = frozen()
    models.store_in(pipeline, TrainConfig(quantize=how))
    unet = pipeline.unet
    given = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 77, 32))
    with torch.no_grad():
        before = unet(*given).sample
        adapters.attach(pipeline, LoraConfig(dora=True), seed=0)
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        assert not torch.equal(unet(*given).sample, before)
        with adapters.switched_off(pipeline):
            assert torch.equal(unet(*given).sample, before)


# Runs

ALL = f"{EVERYTHING} train.ema_decay=0.9 train.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        ("int8", ["lora.rank_stabilised=true", "preview.every=0"]),
        ("nf4", ["train.mixed_precision=bf16", *ALL.split()]),
    ],
    ids=["int8", "nf4 with all else"],
)
def test_a_run_resumes_to_the_bit_and_its_adapter_is_like_any_other(
    world, tmp_path, how, overrides
):
    asked = (f"train.quantize={how}", *overrides)
    uninterrupted = run(world, tmp_path / "run", *asked)
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    resumed = run(world, tmp_path / "run", *asked)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    assert shapes(uninterrupted) == shapes(plain_adapter(world, tmp_path, overrides))


def plain_adapter(world, folder, overrides):
    """Of the base as it came, before any training."""
    config = load(LoraRun, arguments(world, folder / "plain", *overrides))
    pipeline = frozen()
    adapters.attach(pipeline, config.lora, seed=0)
    (folder / "plain").mkdir()
    export.save_lora(pipeline, folder / "plain")
    return load_file(folder / "plain/pytorch_lora_weights.safetensors")


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_a_run_on_a_quantised_base_goes_on_from_an_adapter(world, tmp_path):
    tensors = plain_adapter(world, tmp_path, ["lora.dropout=0"])
    started = f"lora.start_from={tmp_path / 'plain'}"
    short = ("train.steps=2", "preview.every=0", "optim.learning_rate=1e-6", "lora.dropout=0")
    trained = run(world, tmp_path / "run", "train.quantize=nf4", started, *short)
    assert shapes(trained) == shapes(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [FullRun, DreamBoothRun])
def test_what_trains_in_full_is_not_quantised(world, kind):
    config = load(kind, IN_FULL[kind] + ["output=run", f"model.path={world / 'base'}"])
    base = models.inspect(config.model)
    demands.check_settings(config, base)
    config.train.quantize = "nf4"
    with pytest.raises(UserError, match="train.quantize=nf4 is for a frozen UNet"):
        demands.check_settings(config, base)


IN_FULL = {
    FullRun: ["data.path=pictures", "data.caption=a dog"],
    DreamBoothRun: ["data.path=pictures", "data.caption=a zwx dog", "dreambooth.class_prompt=dog"],
}
