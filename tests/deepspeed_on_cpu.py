"""Runs an entry as `accelerate launch` with configs/accelerate/deepspeed.yaml would, but on CPUs:

    torchrun --nproc-per-node=2 tests/deepspeed_on_cpu.py train/full.py key=value ...

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


def launch_settings() -> dict[str, str]:
    """The environment that the launcher gives its processes."""
    config = ROOT / "configs/accelerate/deepspeed.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "entry.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, settings = prepare_deepspeed_cmd_env(arguments)
    return {key: value for key, value in settings.items() if key.startswith("ACCEL")}


if __name__ == "__main__":
    PartialState(cpu=True)
    os.environ |= launch_settings() | {"DS_ACCELERATOR": "cpu"}
    import deepspeed

    from train import launch

    # What it would compile for CPUs; torch's own does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    launch.Accelerator = lambda **settings: Accelerator(**settings | {"cpu": False})  # type: ignore
    entry = importlib.import_module(sys.argv[1].removesuffix(".py").replace("/", "."))
    entry.main(sys.argv[2:])
