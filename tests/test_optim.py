import math
import sys

import pytest
import torch
from torch import nn

from train import optim
from train.config import LoopConfig, OptimConfig, UserError, validate

STEPS = 20
EVERY = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free")


def settings_of(name, **settings):
    """Settings that suit the optimizer."""
    own = {"prodigy": {"learning_rate": 1.0}, "schedule_free": {"schedule": "constant"}}
    return OptimConfig(name=name, **{"final_learning_rate": 0, **own.get(name, {}), **settings})


# The schedule


def rates(**settings):
    config = OptimConfig(learning_rate=1.0, final_learning_rate=0.1, **settings)
    return [optim.rate_factor(step, steps=STEPS, config=config) for step in range(STEPS)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 19])
def test_warmup_rises_evenly_to_the_peak_and_the_last_step_is_the_floor(schedule, warmup):
    course = rates(schedule=schedule, warmup_steps=warmup)
    rise = [*course[:warmup], course[warmup]]
    assert rise == pytest.approx([(k + 1) / (warmup + 1) for k in range(warmup + 1)])
    fall = course[warmup:]
    assert fall == sorted(fall, reverse=True) and min(course) > 0
    if len(fall) > 1:
        assert fall[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_the_cosine_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 1, eta_min=0.1)
    expected = []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(schedule="cosine") == pytest.approx(expected)


def test_a_run_of_one_step_trains_at_the_peak():
    assert optim.rate_factor(0, steps=1, config=OptimConfig()) == pytest.approx(1.0)


def test_each_part_falls_from_its_own_peak_to_the_same_share_of_it_in_any_order():
    config = OptimConfig(
        learning_rate=0.5,
        final_learning_rate=0.05,
        warmup_steps=3,
        text_encoder={"learning_rate": 2.0},
    )
    parts = {"unet": named(net()), "text_encoder": named(net())}
    optimizer = optim.build(optim.groups(parts, config), config)
    schedule = optim.Schedule(optimizer, steps=STEPS, config=config)
    for step in (STEPS - 1, 0, 7):
        factor = optim.rate_factor(step, steps=STEPS, config=config)
        found = schedule.apply(step)
        assert found == pytest.approx({"unet": 0.5 * factor, "text_encoder": 2.0 * factor})
        assert list(found) == ["unet", "text_encoder"]
        of = [(g["part"], g["lr"]) for g in optimizer.param_groups]
        assert of == [(part, pytest.approx(found[part])) for part, _ in of]
    assert schedule.apply(STEPS - 1) == pytest.approx({"unet": 0.05, "text_encoder": 0.2})


# Groups


def net():
    """A convolution, a norm and an embedding, the norm's bias frozen."""
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 3, 3), "norm": nn.GroupNorm(1, 3), "words": nn.Embedding(5, 4)}
    )
    model["norm"].bias.requires_grad_(False)
    return model


def named(model):
    return list(model.named_parameters())


def test_matrices_decay_and_biases_and_norms_do_not():
    model = net()
    found = optim.groups({"unet": named(model)}, OptimConfig(weight_decay=0.3))
    assert [(g["weight_decay"], g["lr"], g["part"]) for g in found] == [
        (0.3, 1e-4, "unet"),
        (0.0, 1e-4, "unet"),
    ]
    decays, rests = ([id(p) for p in g["params"]] for g in found)
    assert decays == [id(model["conv"].weight), id(model["words"].weight)]
    assert rests == [id(model["conv"].bias), id(model["norm"].weight)]


def test_all_decay_on_demand():
    (only,) = optim.groups({"unet": named(net())}, OptimConfig(weight_decay=0.3, decay="all"))
    assert len(only["params"]) == 4 and only["weight_decay"] == 0.3


def test_the_magnitudes_of_dora_do_not_decay_whatever_their_shape():
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(target_modules=["0"], use_dora=True, r=2)
    model = get_peft_model(nn.Sequential(nn.Conv2d(2, 3, 3)), settings)
    found = optim.groups({"unet": named(model)}, OptimConfig())
    magnitudes = {id(p) for name, p in named(model) if "magnitude" in name}
    assert [len(g["params"]) for g in found] == [2, 1]
    assert {id(p) for p in found[1]["params"]} == magnitudes and found[1]["weight_decay"] == 0


def test_parts_have_their_own_rate_and_decay_and_tokens_do_not_decay():
    config = OptimConfig(
        learning_rate=1e-3,
        weight_decay=0.1,
        text_encoder={"learning_rate": 1e-5, "weight_decay": 0.2},
        tokens={"learning_rate": 5e-3},
    )
    parts = {name: named(nn.Embedding(2, 3)) for name in ("tokens", "unet", "text_encoder")}
    found = [(g["part"], g["lr"], g["weight_decay"]) for g in optim.groups(parts, config)]
    assert found == [("tokens", 5e-3, 0.0), ("unet", 1e-3, 0.1), ("text_encoder", 1e-5, 0.2)]


def test_a_part_that_is_frozen_has_no_group():
    frozen = net().requires_grad_(False)
    parts = {"unet": named(net()), "text_encoder": named(frozen)}
    assert {g["part"] for g in optim.groups(parts, OptimConfig())} == {"unet"}


# The optimizers


def minimised(name, steps=60, **settings):
    """Distance from a minimum before and after so many steps."""
    config = settings_of(name, **settings)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 80))
    target = torch.randn(64, 80)
    groups = optim.groups({"unet": [("weight", weight)]}, config)
    optimizer = optim.build(groups, config)
    if name == "schedule_free":
        optimizer.train()
    schedule = optim.Schedule(optimizer, steps=steps, config=config)
    before = (weight - target).square().mean().item()
    for step in range(steps):
        schedule.apply(step)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    return before, (weight - target).square().mean().item()


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_descends(name):
    rate = {} if name == "prodigy" else {"learning_rate": 0.05}
    steps = 200 if name == "prodigy" else 60
    before, after = minimised(name, steps, **rate)
    assert after < before / 4


@pytest.mark.parametrize("name", EVERY)
def test_weight_decay_is_decoupled_and_of_the_group(name):
    """Two weights with one gradient: the difference after a step is the decay."""
    config = settings_of(name, weight_decay=0.5, learning_rate=1.0 if name == "prodigy" else 0.01)
    # Prodigy's first step is too short for fp32, and bitsandbytes knows no fp64.
    dtype = torch.float64 if name == "prodigy" else torch.float32
    decayed, other = (nn.Parameter(torch.ones(80, 80, dtype=dtype)) for _ in range(2))
    groups = [
        {"params": [decayed], "weight_decay": 0.5},
        {"params": [other], "weight_decay": 0.0},
    ]
    optimizer = optim.build(groups, config)
    if name == "schedule_free":
        optimizer.train()
    for weight in (decayed, other):
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()
    rate = optimizer.param_groups[0]["lr"]
    if name == "prodigy":  # times its first guess, with Adam's bias correction
        rate *= 1e-6 * math.sqrt(1 - 0.999) / (1 - 0.9)
    assert (other - decayed).mean().item() == pytest.approx(rate * 0.5, rel=0.02)


def test_adamw_is_torchs_fused_with_the_configured_settings():
    config = OptimConfig(
        learning_rate=0.3, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2, final_learning_rate=0
    )
    optimizer = optim.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}], config)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    settings = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    assert settings == (0.3, (0.8, 0.9), 1e-5, 0.2)
    assert group["fused"] is True


def test_where_a_device_has_no_fused_kernel_torch_chooses():
    weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
    optimizer = optim.build([{"params": [weight]}], OptimConfig())
    assert optimizer.param_groups[0]["fused"] is None


def test_adafactor_moves_a_tensor_of_zeros_at_the_rate_it_is_given():
    """The second factor of a LoRA starts at zero."""
    weight = nn.Parameter(torch.zeros(8, 8))
    config = settings_of("adafactor", learning_rate=1e-2)
    optimizer = optim.build([{"params": [weight]}], config)
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert torch.allclose(weight, torch.full_like(weight, -1e-2))
    assert set(optimizer.state[weight]) == {"step", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"}


def test_the_schedules_warmup_is_schedule_frees_own():
    from schedulefree import AdamWScheduleFree

    config = settings_of("schedule_free", learning_rate=0.1, warmup_steps=4, weight_decay=0.0)
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = optim.build([{"params": [ours]}], config)
    reference = AdamWScheduleFree([theirs], lr=0.1, warmup_steps=5)
    schedule = optim.Schedule(optimizer, steps=12, config=config)
    optimizer.train()
    reference.train()
    for step in range(12):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        schedule.apply(step)
        optimizer.step()
        reference.step()
    optimizer.eval()
    reference.eval()
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_prodigys_rate_is_the_one_it_has_found():
    weight = nn.Parameter(torch.ones(4))
    config = settings_of("prodigy", schedule="constant")
    optimizer = optim.build([{"params": [weight]}], config)
    schedule = optim.Schedule(optimizer, steps=STEPS, config=config)
    assert schedule.apply(0) == pytest.approx({"unet": 1e-6})
    for _ in range(30):
        weight.grad = 2 * weight.detach()
        optimizer.step()
    assert schedule.apply(STEPS - 1)["unet"] == optimizer.param_groups[0]["d"] > 2e-6


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("adamw8bit", "bitsandbytes", "pip install bitsandbytes"),
        ("prodigy", "prodigyopt", r"pip install 'sd-atelier\[optimizers\]'"),
        ("schedule_free", "schedulefree", r"pip install 'sd-atelier\[optimizers\]'"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, name, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    group = {"params": [torch.nn.Parameter(torch.zeros(1))]}
    with pytest.raises(UserError, match=f"optim.name={name} needs {module}: {remedy}"):
        optim.build([group], settings_of(name))


# Settings that do not go together


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"name": "prodigy"}, "optim.learning_rate=0.0001.*prodigy.*learning_rate=1"),
        (
            {"name": "prodigy", "learning_rate": 1, "text_encoder": {"learning_rate": 0.5}},
            "optim.text_encoder.learning_rate=0.5.*prodigy has one rate",
        ),
        (
            {"name": "prodigy", "learning_rate": 1, "tokens": {"learning_rate": 2}},
            "optim.tokens.learning_rate=2.*prodigy has one rate",
        ),
        ({"name": "schedule_free"}, "optim.schedule=cosine.*optim.schedule=constant"),
        (
            {"name": "schedule_free", "schedule": "constant", "betas": (0, 0.9)},
            "optim.betas.*above 0",
        ),
        ({"betas": (0.9, 1.0)}, r"optim.betas=\[0.9, 1.0\] must be"),
        ({"final_learning_rate": 1.0}, "optim.final_learning_rate=1.0 must not exceed"),
    ],
)
def test_what_an_optimizer_cannot_do_is_said(optimizer, message):
    with pytest.raises(UserError, match=message):
        validate(LoopConfig, {"output": "x", "optim": optimizer}, where="test")


def test_one_average_is_enough():
    values = {"output": "x", "optim": {"name": "schedule_free", "schedule": "constant"}}
    validate(LoopConfig, values, where="test")
    with pytest.raises(UserError, match="train.ema_decay=0.9.*schedule_free averages"):
        validate(LoopConfig, values | {"train": {"ema_decay": 0.9}}, where="test")
