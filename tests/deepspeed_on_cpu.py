"""Runs an entry as `accelerate launch` with configs/accelerate/deepspeed.yaml would, but on CPUs:

    torchrun --nproc-per-node=2 tests/deepspeed_on_cpu.py train/full.py key=value ...

With --zero-stage=3 before the entry the configuration is deepspeed_zero3.yaml.

Accelerate leaves DeepSpeed out where it is told to use CPUs, so it is not told. All that it does
from there on, and all that DeepSpeed does, is as on GPUs.
"""

import importlib
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def launch_settings(name: str = "deepspeed.yaml") -> dict[str, str]:
    """The environment that the launcher gives its processes."""
    config = ROOT / "configs/accelerate" / name
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "entry.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, settings = prepare_deepspeed_cmd_env(arguments)
    return {key: value for key, value in settings.items() if key.startswith("ACCEL")}


if __name__ == "__main__":
    PartialState(cpu=True)
    stage_3 = sys.argv[1] == "--zero-stage=3"
    settings = launch_settings(f"deepspeed{'_zero3' if stage_3 else ''}.yaml")
    os.environ |= settings | {"DS_ACCELERATOR": "cpu"}
    arguments = sys.argv[1 + stage_3 :]
    import deepspeed

    from train import launch

    # What it would compile for CPUs; torch's own does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    launch.Accelerator = lambda **settings: Accelerator(**settings | {"cpu": False})  # type: ignore
    entry = importlib.import_module(arguments[0].removesuffix(".py").replace("/", "."))
    entry.main(arguments[1:])
