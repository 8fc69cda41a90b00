"""The memory that a process has resident, as the kernel counts it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def peak_resident(process: int | None = None) -> int:
    """The most bytes that a process (this one) had in memory, pages of mapped files among them.

    0 for another process that has ended. From /proc, where there is one: what `getrusage` says
    begins, on Linux, with the peak of the process that this one was started from.
    """
    try:
        status = Path(f"/proc/{process or os.getpid()}/status").read_text()
    except OSError:
        if process is not None:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
