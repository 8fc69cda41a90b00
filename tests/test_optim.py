import sys

import pytest
import torch

from train import optim
from train.config import OptimConfig, UserError

STEPS = 20


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


def test_each_group_keeps_its_own_peak_whatever_was_applied_before():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    config = OptimConfig(learning_rate=0.5, final_learning_rate=0.05, warmup_steps=3)
    optimizer = optim.build([{"params": [a]}, {"params": [b], "lr": 2.0}], config)
    schedule = optim.Schedule(optimizer, steps=STEPS, config=config)
    for step in (STEPS - 1, 0, 7):
        factor = optim.rate_factor(step, steps=STEPS, config=config)
        assert schedule.apply(step) == pytest.approx(0.5 * factor)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(2.0 * factor)


def test_adamw_has_the_configured_settings():
    config = OptimConfig(
        learning_rate=0.3, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2, final_learning_rate=0
    )
    optimizer = optim.build([{"params": [torch.nn.Parameter(torch.zeros(1))]}], config)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    settings = group["lr"], group["betas"], group["eps"], group["weight_decay"]
    assert settings == (0.3, (0.8, 0.9), 1e-5, 0.2)


def test_a_missing_bitsandbytes_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    group = {"params": [torch.nn.Parameter(torch.zeros(1))]}
    with pytest.raises(UserError, match="optim.name=adamw8bit.*pip install bitsandbytes"):
        optim.build([group], OptimConfig(name="adamw8bit"))
