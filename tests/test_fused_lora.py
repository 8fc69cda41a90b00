"""The update of a linear layer within one product is PEFT's, but for rounding."""

import pytest
import torch

from tests.tiny import tiny_pipeline
from train import adapters, fused_lora
from train.config import LoraConfig


def adapted(**settings):
    """A tiny UNet with adapters whose second factors are not zero."""
    pipeline = tiny_pipeline()
    config = LoraConfig(rank=4, alpha=3, targets=["attention", "proj", "feed_forward"], **settings)
    adapters.attach(pipeline, config, seed=0)
    torch.manual_seed(0)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return pipeline.unet.train()


def passed(unet, dtype=None):
    """Its prediction and the gradients of what trains."""
    torch.manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, unet.config.cross_attention_dim)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = unet(latents, torch.tensor([3, 700]), encoder_hidden_states=text).sample
    trains = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out.float().square().sum(), list(trains.values()))
    return out.detach(), dict(zip(trains, gradients, strict=True))


def fused(unet):
    return [layer for layer in fused_lora._linear(unet) if "forward" in vars(layer)]


def distance(found, expected):
    """Of prediction and gradients together, as a share of the expected ones."""
    one, other = (
        torch.cat([out.flatten(), *(g.flatten() for g in gradients.values())]).float()
        for out, gradients in (found, expected)
    )
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "settings", [{}, {"rank_stabilised": True, "blocks": {"mid_block": 2}}, {"dropout": 0.3}]
)
def test_prediction_and_gradients_are_peft_s(settings):
    unet = adapted(**settings)
    assert len(fused(unet)) == len(fused_lora._linear(unet)) > 10
    found = passed(unet)
    fused_lora.undo(unet)
    assert not fused(unet)
    expected = passed(unet)
    assert distance(found, expected) < 1e-6
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_in_bf16_it_is_as_near_to_the_exact_result_as_peft_is():
    unet = adapted()
    exact, found = passed(unet), passed(unet, torch.bfloat16)
    fused_lora.undo(unet)
    plain = passed(unet, torch.bfloat16)
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    assert distance(found, exact) < 1.2 * distance(plain, exact) < 0.1


def test_fewer_passes_over_activations():
    """Of the size of a layer's output: PEFT scales and adds, and under autocast casts there and
    back."""
    unet = adapted()
    counts = []
    for undo in (lambda _: None, fused_lora.undo):
        undo(unet)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            passed(unet, torch.bfloat16)
        names = {"aten::mul", "aten::add", "aten::_to_copy"}
        counts.append(sum(e.count for e in profile.key_averages() if e.key in names))
    assert counts[0] < counts[1] - 2 * len(fused_lora._linear(unet))


def test_pictures_are_made_by_peft_s_own():
    unet = adapted()
    with torch.no_grad():
        latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, unet.config.cross_attention_dim)
        mine = unet(latents, 3, encoder_hidden_states=text).sample
        fused_lora.undo(unet)
        assert torch.equal(mine, unet(latents, 3, encoder_hidden_states=text).sample)


def test_other_kinds_are_left_to_peft():
    assert not fused(adapted(dora=True))
