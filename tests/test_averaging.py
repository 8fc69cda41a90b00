import pytest
import torch
from torch import nn

from train import optim
from train.averaging import averages_of
from train.config import OptimConfig

DECAY = 0.7


def net(seed=0):
    """Two layers, the second frozen."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    return model


def start(name="adamw", decay=None):
    """Model, optimizer and averages of a run."""
    model = net()
    config = OptimConfig(name=name, learning_rate=0.05, schedule="constant", betas=(0.8, 0.9))
    optimizer = optim.build(optim.groups({"unet": model.named_parameters()}, config), config)
    return model, optimizer, averages_of(model, optimizer, decay)


def train(model, optimizer, averages, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averages.update(step, torch.ones(()))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CASES = [("adamw", None), ("adamw", DECAY), ("schedule_free", None)]


@pytest.mark.parametrize(("name", "decay"), CASES)
def test_the_live_weights_are_exactly_back_and_training_goes_on_as_if_nothing_was(name, decay):
    model, optimizer, averages = start(name, decay)
    undisturbed = start(name, decay)
    train(*undisturbed, 8)
    train(model, optimizer, averages, 4)
    before = values(model)
    for _ in range(3):
        with averages.applied():
            assert same(values(model), before) == (name == "adamw" and decay is None)
    assert same(values(model), before)
    train(model, optimizer, averages, 4, first=4)
    assert same(values(model), values(undisturbed[0]))


@pytest.mark.parametrize(("name", "decay"), CASES)
def test_the_live_weights_are_back_after_an_error_too(name, decay):
    model, optimizer, averages = start(name, decay)
    train(model, optimizer, averages, 3)
    before = values(model)
    with pytest.raises(KeyError), averages.applied():
        raise KeyError
    assert same(values(model), before)
    train(model, optimizer, averages, 1, first=3)


@pytest.mark.parametrize(("name", "decay"), CASES)
def test_what_was_shown_is_what_is_settled_for(name, decay):
    model, optimizer, averages = start(name, decay)
    train(model, optimizer, averages, 5)
    with averages.applied():
        shown = values(model)
    averages.settle()
    assert same(values(model), shown)


@pytest.mark.parametrize(("name", "decay"), CASES)
def test_before_the_first_step_the_weights_are_the_starting_ones(name, decay):
    model, _, averages = start(name, decay)
    with averages.applied():
        assert same(values(model), values(net()))


def test_the_moving_average_is_its_definition_in_float64():
    model, optimizer, averages = start(decay=DECAY)
    expected = {name: v.double() for name, v in values(model).items()}
    for step in range(30):
        train(model, optimizer, averages, 1, first=step)
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in values(model).items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    state = averages.state()
    assert state.keys() == {"0.weight", "0.bias"}
    for name, average in state.items():
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), expected[name], atol=1e-6)


def test_the_frozen_stays_and_is_not_kept_twice():
    model, optimizer, averages = start(decay=DECAY)
    train(model, optimizer, averages, 3)
    averages.settle()
    assert torch.equal(model[1].weight, net()[1].weight)


def test_schedule_frees_average_is_the_weighted_mean_of_its_iterates():
    """At a constant rate x is the plain mean of z (Defazio et al. 2024, equation 3)."""
    model, optimizer, averages = start("schedule_free")
    iterates = []
    for step in range(6):
        train(model, optimizer, averages, 1, first=step)
        iterates.append(optimizer.state[model[0].weight]["z"].clone())
    averages.settle()
    assert torch.allclose(model[0].weight, torch.stack(iterates).mean(0), atol=1e-6)


def test_the_moving_average_goes_on_from_its_state():
    model, optimizer, averages = start(decay=DECAY)
    train(model, optimizer, averages, 3)
    kept = {name: tensor.clone() for name, tensor in averages.state().items()}
    again = averages_of(model, optimizer, DECAY)
    again.load(kept)
    train(model, optimizer, averages, 1, first=3)
    expected = averages.state()
    other = net()
    other.load_state_dict(model.state_dict())
    again._model = other  # the same weights, seen by the other average
    again.update(3, torch.ones(()))
    assert same(again.state(), expected)


def test_a_checkpoint_without_an_average_starts_one_at_its_weights():
    model, optimizer, averages = start(decay=DECAY)
    train(model, optimizer, averages, 3)
    averages.load({})
    assert same(averages.state(), {k: v for k, v in values(model).items() if k.startswith("0")})
