"""Packages that only some settings need. Nothing here is heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from train.config import UserError

# optim.name -> the module it needs, and what installs that.
_OPTIMIZERS = {
    "adamw8bit": ("bitsandbytes", "bitsandbytes"),
    "prodigy": ("prodigyopt", "'sd-atelier[optimizers]'"),
    "schedule_free": ("schedulefree", "'sd-atelier[optimizers]'"),
}


def require_optimizer(name: str) -> None:
    """Raises UserError where the package of optim.name=`name` is not installed."""
    module, installs = _OPTIMIZERS.get(name, (None, None))
    if module is not None and importlib.util.find_spec(module) is None:
        raise UserError(
            f"optim.name={name} needs {module}: pip install {installs}, or use optim.name=adamw"
        )


def require_trackers(names: Iterable[str]) -> None:
    """Raises UserError where the package of one of tracking.trackers is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracking.trackers: {name} is not installed: pip install 'sd-atelier[{name}]', or "
                "leave it out; metrics.jsonl is written in any case"
            )


def require_quantiser(how: str) -> None:
    """Raises UserError where train.quantize=`how` needs a package that is not installed."""
    if how == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.quantize=nf4 needs bitsandbytes: pip install 'bitsandbytes>=0.46', or use "
            "train.quantize=int8"
        )


def require_deepspeed() -> None:
    """Raises UserError where DeepSpeed, for which the launcher asks, is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "DeepSpeed is not installed: pip install 'sd-atelier[deepspeed]', or launch with "
            "--config_file configs/accelerate/fsdp.yaml, which splits more over the GPUs"
        )
