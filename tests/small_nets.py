"""A net of a few parameters, and its training, for tests of what is saved of both."""

import torch
from torch import nn

from train.checkpoint import Checkpoints


class Net(nn.Module):
    """Two trained layers around a frozen one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.frozen(self.first(x)).relu())


def optimizer_of(model, **settings):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, **settings
    )


def named(model):
    return dict(model.named_parameters())


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key


def saved(folder, **settings):
    """Checkpoints of steps 2 and 4, and the model and optimizer as of step 4."""
    model = Net()
    optimizer = optimizer_of(model)
    checkpoints = Checkpoints(folder, keep=2, **settings)
    for step in (2, 4):
        train(model, optimizer, 2, start=step - 2)
        checkpoints.save(step, model, optimizer)
    checkpoints.wait()
    return checkpoints, model, optimizer


def restored(checkpoints, **settings):
    """The newest step, in a new model and optimizer."""
    model = Net(seed=9)
    model.frozen.load_state_dict(Net().frozen.state_dict())
    optimizer = optimizer_of(model, **settings)
    return checkpoints.restore(model, optimizer), model, optimizer


def contents(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())
