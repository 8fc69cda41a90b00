"""How things are measured: in turns, in fresh processes, and with the machine named."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.config import ROOT, RunFailed
from train.resident import peak_resident

LIBRARIES = ("torch", "numpy", "Pillow", "pyarrow", "safetensors", "xxhash", "diffusers")
SAMPLE_SECONDS = 0.01


def environment(command: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions, the date and the command."""
    return {
        "command": " ".join(["python", os.path.relpath(command[0], ROOT), *command[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": {
            "processor": _from_file("/proc/cpuinfo", "model name") or platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(_memory_kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        },
        "versions": {"python": platform.python_version()}
        | {library: importlib.metadata.version(library) for library in LIBRARIES},
        "revision": _revision(),
    }


def described(report: dict[str, Any]) -> str:
    """The environment in a few lines of Markdown."""
    hardware = report["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"`{report['command']}`\n\n{report['date']}, {hardware['cores']} cores of "
        f"{hardware['processor']}, {hardware['memory_gib']} GiB; {versions}."
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def span(values: dict[str, float], digits: int = 2) -> str:
    """A `spread` as tables have it."""
    least, most = f"{values['min']:,.{digits}f}", f"{values['max']:,.{digits}f}"
    return f"{values['median']:,.{digits}f} ({least} to {most})"


def in_turns(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of two things done one after the other, again and again: `first`, `second`, and
    `ratio`, which is that of second to first within each round."""
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return {
        "first": spread([one for one, _ in pairs]),
        "second": spread([other for _, other in pairs]),
        "ratio": spread([other / one for one, other in pairs]),
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fresh(function: str, **arguments: Any) -> dict[str, Any]:
    """What a function ("module:name") returns in a process of its own, with its peak memory.

    `peak_mib` is the most that it had in memory, pages of mapped files among it, which the system
    can take back at any time; `peak_anonymous_mib` is without those.
    """
    code = f"from {__name__} import child; child()"
    command = [sys.executable, "-c", code, function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{function} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """The other side of `fresh`."""
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    with _peak_anonymous() as peak:
        result = function(**json.loads(sys.argv[2]))
    result["peak_mib"] = round(peak_resident() / 2**20, 1)
    result["peak_anonymous_mib"] = round(max(peak) / 1024, 1)
    print(json.dumps(result))


@contextmanager
def _peak_anonymous() -> Iterator[list[int]]:
    """Samples of this process's anonymous memory, in KiB."""
    samples: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while True:
            samples.append(_memory_kib("/proc/self/status", "RssAnon"))
            if done.wait(SAMPLE_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield samples
    done.set()
    thread.join()


def _memory_kib(file: str, name: str) -> int:
    return int(_from_file(file, name).split()[0])


def _from_file(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
