"""train/zero.py: DeepSpeed's flat tensors shown by parameter. Whole runs with the real one are in
tests/test_sharding.py, where it is installed."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train import zero


def stage_3(rank, shapes, *, world=2):
    """What a process has at stage 3: parameters that are empty, flat parts padded to one length."""
    parameters, position, start = [], {}, 0
    for number, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.empty(0))
        numel = torch.Size(shape).numel()
        parameter.ds_id, parameter.ds_shape, parameter.ds_numel = number, torch.Size(shape), numel
        padded = -(-numel // world)
        position[number] = [0, start, padded]
        start += padded
        parameters.append(parameter)
    flat = torch.zeros(start)
    return parameters, SimpleNamespace(
        fp32_partitioned_groups_flat=[flat],
        fp16_groups=[parameters],
        sub_group_to_group_id={0: 0},
        grad_position=position,
        get_param_id=lambda parameter: parameter.ds_id,
        param_groups=[{"lr": 1.0, "params": []}],
        state=defaultdict(dict),
    )


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_is_loaded_is_what_all_processes_give_back(monkeypatch, world):
    """Fails where a part is put elsewhere, or the padding at a parameter's end counts."""
    shapes = [(5,), (2, 3), (1,), (4, 4)]
    values = [torch.arange(1.0, 1 + torch.Size(s).numel()).reshape(s) for s in shapes]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    given = [torch.zeros(shape) for shape in shapes]
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parameters, engine = stage_3(rank, shapes, world=world)
        optimizer = zero.ZeroOptimizer(engine)
        assert optimizer.param_groups[0]["params"] == parameters
        for parameter, value in zip(parameters, values, strict=True):
            optimizer.state[parameter]["exp_avg"] = value
            optimizer.state[parameter]["step"] = torch.tensor(3.0)
        for own, parameter in zip(given, parameters, strict=True):
            found = dict(optimizer.state[parameter].items())
            assert found["step"] == 3 and found["exp_avg"].shape == own.shape
            own += found["exp_avg"]
    assert all(torch.equal(own, value) for own, value in zip(given, values, strict=True))


def test_weights_are_in_parts_at_stage_3_only():
    model = nn.Linear(2, 2)
    assert not zero.is_in_parts(model) and not zero.splits(model)
    with zero.whole(model.parameters()):
        assert model.weight.shape == (2, 2)
    model.weight._hp_mapping = None
    assert zero.splits(model) and not zero.is_in_parts(model)
    model.weight.ds_id = 0
    assert zero.splits(model) and zero.is_in_parts(model)
