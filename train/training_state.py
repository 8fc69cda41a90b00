"""The state of a training by the names of the parameters: their values, and what the optimizer
keeps for them. Names outlive the order of parameters and the way in which they are sharded.

`parameters` are all of a model's by name, `dict(model.named_parameters())`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.checkpoint_files import DamagedCheckpoint
from train.sharding import fill, like, whole

# Of an optimizer's group: what the configuration says, and how the machine computes it. The rest
# the optimizer has found by itself, as Prodigy's distance and schedule-free's sums.
_CONFIGURED = (
    *("part", "lr", "initial_lr", "weight_decay", "betas", "eps"),
    *("fused", "foreach", "capturable"),
)


Parameters = Mapping[str, nn.Parameter]


def trainable_state(parameters: Parameters) -> dict[str, Tensor]:
    """The values of those that train: the model's own, where they are."""
    return {name: p.detach() for name, p in _trainable(parameters).items()}


def _trainable(parameters: Parameters) -> dict[str, nn.Parameter]:
    return {name: p for name, p in parameters.items() if p.requires_grad}


def gather_for_another(
    parameters: Parameters, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor]
) -> None:
    """This process's share in what another saves: tensor by tensor as it reads them."""
    tensors, _ = optimizer_state(parameters, optimizer)
    for state in (trainable_state(parameters), tensors, averages):
        for tensor in state.values():
            whole(tensor)


@torch.no_grad()
def load_trainable(parameters: Parameters, state: dict[str, Tensor]) -> None:
    """Copies saved values into the parameters that train, whose dtype (fp32) stays. Raises
    DamagedCheckpoint where they are others, or of other shapes."""
    wanted = _trainable(parameters)
    if wanted.keys() != state.keys():
        odd = sorted(wanted.keys() ^ state.keys())[:3]
        raise DamagedCheckpoint(
            f"the checkpoint holds other parameters than the model: {', '.join(odd)}"
        )
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise DamagedCheckpoint(
                f"the checkpoint holds another model: its {name} is {tuple(state[name].shape)}, "
                f"not {tuple(parameter.shape)}"
            )
    for name, parameter in wanted.items():
        fill(parameter, state[name])


def optimizer_state(
    parameters: Parameters, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state by parameter name: tensors as `name/key`, the optimizer's own, scalars and
    group settings as JSON."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, key, value in _optimizer_entries(parameters, optimizer):
        if isinstance(value, Tensor):
            tensors[f"{name}/{key}"] = value
        else:
            scalars[f"{name}/{key}"] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, {"state": scalars, "groups": groups}


def _optimizer_entries(
    parameters: Parameters, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, str, Any]]:
    """Name of the parameter, key and value of all its state, in the same order everywhere."""
    for name, parameter in _trainable(parameters).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name, key, value


def load_optimizer(
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    """The inverse of `optimizer_state`, once the model has its weights. Moments stay in their own
    dtype and go where the parameter is.

    Rates, decay, betas and epsilon stay as they are configured now. Raises DamagedCheckpoint where
    the checkpoint is of other parameters.
    """
    devices = _step_devices(optimizer)
    configured = [{k: g[k] for k in _CONFIGURED if k in g} for g in optimizer.param_groups]
    _load_groups(optimizer, scalars["groups"])
    trained = {name: p for name, p in parameters.items() if p in devices}
    for target, value in {**tensors, **scalars["state"]}.items():
        name, _, key = target.rpartition("/")
        parameter = trained.get(name)
        if parameter is None:
            raise DamagedCheckpoint(
                f"the checkpoint holds the optimizer's {key} of {name}, which is not trained here"
            )
        if isinstance(value, Tensor):
            on_host = key == "step" and devices[parameter].type == "cpu"
            value = value.cpu() if on_host else like(parameter, value)
        optimizer.state[parameter][key] = value
    _configure(optimizer, configured)


def _load_groups(optimizer: torch.optim.Optimizer, saved_groups: list[dict[str, Any]]) -> None:
    if len(saved_groups) != len(optimizer.param_groups):
        raise DamagedCheckpoint(
            f"the checkpoint holds {len(saved_groups)} groups of parameters, the optimizer "
            f"{len(optimizer.param_groups)}: it was written by another version or with other "
            "optim.* settings"
        )
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def _configure(optimizer: Any, configured: list[dict[str, Any]]) -> None:
    """Puts the settings of now in place of those of the checkpoint."""
    groups = optimizer.param_groups
    before, now = ([group.get("betas") for group in all_] for all_ in (groups, configured))
    # A schedule-free optimizer's weights are a mean by beta: of other betas it is another mean.
    remix = before != now and callable(getattr(optimizer, "eval", None))
    if remix:
        optimizer.eval()
    for group, settings in zip(groups, configured, strict=True):
        group.update(settings)
    if remix:
        optimizer.train()


def _step_devices(optimizer: torch.optim.Optimizer) -> dict[Tensor, torch.device]:
    """Of every parameter that trains: where torch's optimizers count its steps, fused ones on its
    device."""
    return {
        parameter: parameter.device
        if group.get("fused") or group.get("capturable")
        else torch.device("cpu")
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
