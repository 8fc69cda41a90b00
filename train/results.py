"""What a trained run leaves for its user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from train import export, report

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.method import Method


def publisher(method: Method, directory: Path, accelerator: Accelerator) -> Callable[[], None]:
    """What writes the report of the run and then its result into `directory`, a folder of the run
    directory: a run with a result is finished. To be called by all processes."""

    def publish() -> None:
        if accelerator.is_main_process:
            report.write(directory.parent)
        export.publish(method, directory, accelerator)

    return publish
