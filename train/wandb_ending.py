"""Has wandb show how a run ended, where sending its files took longer than its dashboard was given.

Started by train/board_wandb.py, with JSON on its input: {"run": arguments of wandb.init, "code",
"after"}. It waits until that process, number "after", is gone, whose service would go on saying
that the run is under way, and takes no longer than SECONDS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

SECONDS = 60


def main() -> None:
    signal.alarm(SECONDS)  # which ends this process
    told = json.loads(sys.stdin.read())
    while os.getppid() == told["after"]:
        time.sleep(0.05)
    os.environ.pop("WANDB_SERVICE", None)  # that of the process before
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        x_primary=False,  # its files are those of the process before
    )
    wandb.init(**told["run"], settings=settings).finish(exit_code=told["code"])


if __name__ == "__main__":
    main()
