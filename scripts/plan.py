"""Predicts the memory, time and disk of a training run, before anything is loaded.

    python scripts/plan.py --config configs/lora.yaml data.path=my/pictures card=24
    python scripts/plan.py --config configs/full.yaml images=5000 card=80 gpu="NVIDIA H100 PCIe"
    python scripts/plan.py --config runs/NAME/config.yaml device=cpu output=plan.json

Beside keys of its own it takes those of the run. No weights are read and nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from scripts.planning import PlanConfig, plan, run_config, text
from train import screens
from train.config import UserError, command, load


def main(arguments: list[str]) -> None:
    own, rest = split(arguments)
    config = load(PlanConfig, own)
    if config.output and config.output.is_dir():
        raise UserError(f"output={config.output} is a folder; give a file for the plan's JSON")

    run = run_config(config.method, rest)
    with screens.working("working out the plan"):
        made = plan(config, run)
    print(text(made))
    if config.output:
        try:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            config.output.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"output={config.output} cannot be written ({error})") from None
    screens.done(config.output, plan=made)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The plan's own arguments, and the run's."""
    if {"--help", "-h"} & set(arguments):
        return ["--help"], []
    own = [a for a in arguments if a.partition("=")[0] in PlanConfig.model_fields]
    return own, [a for a in arguments if a not in own]


if __name__ == "__main__":
    command(main)
