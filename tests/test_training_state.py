"""What is saved by name of every kind of optimizer comes back, and training goes on as if nothing
had been."""

import pytest
import torch
from torch import nn

from tests.small_nets import Net, named, optimizer_of, same, train
from train import optim
from train.averaging import averages_of
from train.checkpoint import Checkpoints
from train.checkpoint_files import DamagedCheckpoint
from train.config import OptimConfig
from train.packed import Packed
from train.training_state import load_optimizer, optimizer_state, trainable_state

RUNS = {
    "adamw": {},
    "adamw with an average": {"ema_decay": 0.6},
    "adamw8bit": {"name": "adamw8bit"},
    "adafactor": {"name": "adafactor"},
    "prodigy": {"name": "prodigy", "learning_rate": 1.0},
    "prodigy with an average": {"name": "prodigy", "learning_rate": 1.0, "ema_decay": 0.6},
    "schedule_free": {"name": "schedule_free", "schedule": "constant", "warmup_steps": 4},
}


class Wide(Net):
    """With a layer that is large enough for moments of 8 bits (4096)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.first, self.frozen = nn.Linear(3, 1500), nn.Linear(1500, 8)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.last.bias)  # of a zero Prodigy keeps a scalar


class Run:
    """Six steps of a run as the loop takes them."""

    def __init__(self, kind, seed=0, **changes):
        settings = {"learning_rate": 0.01, "final_learning_rate": 0.0, **RUNS[kind], **changes}
        decay = settings.pop("ema_decay", None)
        config = OptimConfig(**settings)
        self.model = Wide(seed)
        self.model.frozen.load_state_dict(Wide().frozen.state_dict())
        groups = optim.groups({"unet": self.model.named_parameters()}, config)
        self.optimizer = optim.build(groups, config)
        self.schedule = optim.Schedule(self.optimizer, steps=6, config=config)
        self.averages = averages_of(self.model, self.optimizer, decay)

    def train(self, first, last):
        for step in range(first, last):
            self.schedule.apply(step)
            train(self.model, self.optimizer, 1, start=step)
            self.averages.update(step, torch.ones(()))

    def save(self, checkpoints, step):
        checkpoints.save(step, self.model, self.optimizer, self.averages.state())

    def used(self):
        with self.averages.applied():
            return {k: v.clone() for k, v in self.model.state_dict().items()}


@pytest.mark.parametrize("kind", RUNS)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, kind):
    straight, killed, resumed = Run(kind), Run(kind), Run(kind, seed=9)
    straight.train(0, 6)
    checkpoints = Checkpoints(tmp_path, keep=2)
    killed.train(0, 3)
    killed.save(checkpoints, 3)
    assert checkpoints.restore(resumed.model, resumed.optimizer, resumed.averages) == 3
    same(killed.used(), resumed.used())
    resumed.train(3, 6)
    same(straight.model.state_dict(), resumed.model.state_dict())
    same(straight.used(), resumed.used())
    ours, theirs = (optimizer_state(named(run.model), run.optimizer) for run in (straight, resumed))
    same(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    same(straight.averages.state(), resumed.averages.state())
    assert {p.dtype for p in resumed.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", RUNS)
def test_of_an_earlier_checkpoint_the_weights_are_those_that_were_used_then(tmp_path, kind):
    run = Run(kind)
    run.train(0, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    run.save(checkpoints, 3)
    expected = run.used()
    run.train(3, 6)
    checkpoints.load(3, run.model, run.optimizer, run.averages)
    run.averages.settle()
    same(run.model.state_dict(), expected)


@pytest.mark.parametrize("kind", RUNS)
def test_what_is_saved_is_no_part_of_what_trains_on(kind):
    run = Run(kind)
    run.train(0, 2)
    tensors, _ = optimizer_state(named(run.model), run.optimizer)
    state = {**trainable_state(named(run.model)), **tensors}
    packed = Packed(state)
    packed.fill(state)
    before = {k: v.clone() for k, v in state.items()}
    run.train(2, 4)
    same(packed.tensors, before)
    assert any(not torch.equal(state[name], value) for name, value in before.items())


def test_only_what_trains_is_saved():
    names = set(trainable_state(named(Net())))
    assert names == {"first.weight", "first.bias", "last.weight", "last.bias"}


# Settings that have changed


def changed(kind, **settings):
    """A run of three steps, and its state loaded into one that has other settings."""
    before, now = Run(kind), Run(kind, seed=9, **settings)
    before.train(0, 3)
    now.model.load_state_dict(before.model.state_dict())
    tensors, scalars = optimizer_state(named(before.model), before.optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    load_optimizer(named(now.model), now.optimizer, tensors, scalars)
    return before, now


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "prodigy", "schedule_free"])
def test_settings_are_those_of_now_and_findings_those_of_the_checkpoint(kind):
    before, now = changed(kind, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.5)
    matrices, _ = now.optimizer.param_groups
    assert (matrices["betas"], matrices["eps"], matrices["weight_decay"]) == ((0.8, 0.9), 1e-4, 0.5)
    for ours, theirs in zip(now.optimizer.param_groups, before.optimizer.param_groups, strict=True):
        settings = {"params", "lr", "betas", "eps", "weight_decay"}
        assert {k: v for k, v in ours.items() if k not in settings} == {
            k: v for k, v in theirs.items() if k not in settings
        }
    same(*(optimizer_state(named(run.model), run.optimizer)[0] for run in (before, now)))


def test_a_rate_that_has_changed_is_that_of_now():
    _, now = changed("adamw", learning_rate=0.5)
    assert [group["initial_lr"] for group in now.optimizer.param_groups] == [0.5, 0.5]


def test_schedule_frees_average_is_the_same_by_other_betas():
    before, now = changed("schedule_free", betas=(0.5, 0.999))
    ours, theirs = now.used(), before.used()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert not torch.equal(now.model.first.weight, before.model.first.weight)


# What is of another model


def test_another_number_of_groups_is_refused():
    saved = Net()
    state = optimizer_state(named(saved), optimizer_of(saved))
    model = Net()
    groups = [{"params": [p]} for p in model.first.parameters()]
    with pytest.raises(DamagedCheckpoint, match="1 groups of parameters, the optimizer 2"):
        load_optimizer(named(model), torch.optim.AdamW(groups), *state)


def test_state_of_a_parameter_that_does_not_train_is_refused_by_name():
    saved = Net()
    optimizer = optimizer_of(saved)
    train(saved, optimizer, 1)
    model = Net()
    model.first = nn.Identity()
    with pytest.raises(DamagedCheckpoint, match="optimizer's step of first.weight, which is not"):
        load_optimizer(named(model), optimizer_of(model), *optimizer_state(named(saved), optimizer))
