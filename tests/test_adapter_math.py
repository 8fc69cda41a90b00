"""The arithmetic of factors, against changes that are multiplied out."""

import math

import pytest
import torch

from train import adapter_math as am
from train.adapter_math import Factors

LINEAR, KERNEL, POINT = (12, 7), (6, 5, 3, 3), (4, 9, 1, 1)
SHAPES = (LINEAR, KERNEL, POINT)


def random(shape, rank=3, scale=1.5, seed=0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, *shape[1:]), generator=generator)
    up = torch.randn((shape[0], rank, *(1,) * (len(shape) - 2)), generator=generator)
    return Factors(down, up, scale)


def dense(factors: Factors) -> torch.Tensor:
    """By torch's own product and convolution."""
    up, down = factors.up.double(), factors.down.double()
    if up.ndim == 2:
        return factors.scale * up @ down
    product = torch.nn.functional.conv2d(down.transpose(0, 1), up)  # (inputs, outputs, k, k)
    return factors.scale * product.transpose(0, 1)


def close(a, b) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_spectrum_inner_and_distance_are_those_of_the_change(shape):
    one, other = random(shape), random(shape, rank=2, scale=-0.5, seed=1)
    assert one.shape == shape and close(am.delta(one), dense(one))
    a, b = dense(one), dense(other)
    values = torch.linalg.svdvals(a.flatten(1))[:3]
    assert close(am.spectrum(one), values)
    assert close(am.norm(one), a.norm().item())
    assert close(am.inner(one, other), (a * b).sum().item())
    assert close(am.distance(one, other), (a - b).norm().item())
    assert am.distance(one, one) < 1e-12 * am.norm(one)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_exact_and_its_rank_the_sum(shape):
    one, other = random(shape), random(shape, rank=4, seed=1)
    both = am.joined([(one, 0.7), (other, -2.0)])
    assert both.rank == 7 and both.scale == 1.0 and both.shape == shape
    assert close(am.delta(both), 0.7 * dense(one) - 2 * dense(other))


def test_a_rank_above_the_layers_sides_is_no_trouble():
    wide = am.joined([(random(POINT, seed=seed), 1.0) for seed in range(5)])
    assert wide.rank == 15 and len(am.spectrum(wide)) == 4
    small = am.reduced(wide)
    assert small.rank == 4 and close(am.delta(small), am.delta(wide))


@pytest.mark.parametrize("shape", SHAPES)
def test_reducing_leaves_out_just_the_smallest_singular_values(shape):
    one = random(shape, rank=4)
    values = torch.linalg.svdvals(dense(one).flatten(1))
    for rank in (1, 2, 3):
        small = am.reduced(one, rank=rank)
        assert small.rank == rank and small.shape == shape
        assert close(am.distance(one, small), values[rank:].norm().item())
    assert am.reduced(one, rank=9).rank == 4


def test_energy_keeps_as_few_as_hold_its_share():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares: 9, 4, 1 of 14
    ranks = {share: am.rank_for(values, None, share) for share in (0.5, 0.65, 0.92, 0.93, 1.0)}
    assert ranks == {0.5: 1, 0.65: 2, 0.92: 2, 0.93: 3, 1.0: 3}
    assert am.rank_for(values, 2, 0.99) == 2 and am.rank_for(values, None, None) == 3
    assert am.rank_for(torch.zeros(3), 2, 0.5) == 1


@pytest.mark.parametrize("shape", [*SHAPES, (5, 40), (40, 5)])
def test_decomposing_a_change_is_its_best_truncation_and_whole_at_full_rank(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = torch.linalg.svdvals(change.flatten(1))
    for rank in (1, 3):
        small = am.decomposed(change, rank=rank)
        error = (am.delta(small) - change).norm()
        assert small.rank == rank and torch.isclose(error, values[rank:].norm(), rtol=1e-8)
    whole = am.decomposed(change, rank=1000)
    assert whole.rank == len(values) and close(am.delta(whole), change)
    assert am.decomposed(change, energy=0.5).rank < len(values)


def test_full_rank_is_exact_in_fp32_also_where_singular_values_are_tiny():
    generator = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(200, 64, generator=generator, dtype=torch.float64))
    change = u @ torch.diag(torch.logspace(0, -14, 64, dtype=torch.float64)) @ v.T
    whole = am.decomposed(change, rank=64)
    stored = Factors(whole.down.float(), whole.up.float())
    assert stored.finite and (am.delta(stored) - change).norm() < 1e-6 * change.norm()


def test_effective_rank():
    assert am.effective_rank(torch.ones(5)) == pytest.approx(5)
    assert am.effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert am.effective_rank(torch.zeros(3)) == 0
    assert 1 < am.effective_rank(torch.tensor([1.0, 0.1])) < 2


@pytest.mark.parametrize("shape", SHAPES)
def test_doras_change_is_what_peft_makes_of_the_weight(shape):
    from peft import LoraConfig, get_peft_model

    outputs, inputs, *kernel = shape
    kind = torch.nn.Conv2d if kernel else torch.nn.Linear
    layer = kind(inputs, outputs, *kernel[:1], bias=False)
    weight = layer.weight.detach().clone()
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["0"], use_dora=True)
    model = get_peft_model(torch.nn.Sequential(layer), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
        elif "magnitude" in name:
            parameter.data *= 1.3
    tuner = model.base_model.model[0]
    parts = (tuner.lora_A, tuner.lora_B, tuner.lora_magnitude_vector)
    a, b, magnitude = (part["default"].weight.detach() for part in parts)
    factors = Factors(a, b, 4 / 3, magnitude)
    merged = model.merge_and_unload()[0].weight.detach()
    change = am.delta(am.on_base(factors, weight))
    assert torch.allclose(change, (merged - weight).double(), atol=1e-5)
    plain = random(shape)
    assert am.on_base(plain, weight) is plain and math.isfinite(am.norm(factors))
