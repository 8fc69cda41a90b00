"""Runs an entry as `accelerate launch` with configs/accelerate/fsdp.yaml would, but on CPUs:

    torchrun --nproc-per-node=2 tests/fsdp_on_cpu.py train/full.py key=value ...

Accelerate shards only where it sees GPUs, so its state says that there are some. All that it does
from there on, and all that torch does, is as on GPUs.
"""

import importlib
import os
import sys
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def launch_settings() -> dict[str, str]:
    """The environment that the launcher gives its processes."""
    config = ROOT / "configs/accelerate/fsdp.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "entry.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    settings = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in settings.items() if key.startswith(("ACCEL", "FSDP"))}


if __name__ == "__main__":
    os.environ |= launch_settings()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    entry = importlib.import_module(sys.argv[1].removesuffix(".py").replace("/", "."))
    entry.main(sys.argv[2:])
