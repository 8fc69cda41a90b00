"""What a process takes of its machine: for dashboards that do not look themselves."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class SystemUse:
    """Of one process and of the GPUs, from one reading to the next."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        self._gpus = _gpus()
        self._before = (time.monotonic(), self._seconds())

    def read(self) -> dict[str, float]:
        """cpu_percent (100 is one core), resident_gib, and gpu_N_percent, gpu_N_memory_gib of every
        GPU; what cannot be had is left out."""
        found: dict[str, float] = {}
        now, seconds = time.monotonic(), self._seconds()
        then, before = self._before
        self._before = (now, seconds)
        if now > then and seconds >= before > 0:
            found["cpu_percent"] = 100 * (seconds - before) / (now - then)
        with suppress(OSError, ValueError, IndexError):
            pages = int((self._folder / "statm").read_text().split()[1])
            found["resident_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
        return found | self._of_gpus()

    def _seconds(self) -> float:
        """Of processor time so far."""
        try:
            rest = (self._folder / "stat").read_text().rpartition(")")[2].split()
            return (int(rest[11]) + int(rest[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return 0.0

    def _of_gpus(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with suppress(Exception):  # whatever a driver raises
            for index in range(self._gpus.nvmlDeviceGetCount() if self._gpus else 0):
                gpu = self._gpus.nvmlDeviceGetHandleByIndex(index)
                busy = self._gpus.nvmlDeviceGetUtilizationRates(gpu).gpu
                used = self._gpus.nvmlDeviceGetMemoryInfo(gpu).used
                found |= {f"gpu_{index}_percent": busy, f"gpu_{index}_memory_gib": used / 2**30}
        return found


def _gpus() -> Any:
    """NVIDIA's own library, where its Python package (nvidia-ml-py) is installed."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # without the package, a driver or a GPU
        return None
