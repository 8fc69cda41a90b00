"""A process that has imported what a run imports, and forks one process for each run.

Starting Python with torch and diffusers takes seconds, and these tests start hundreds of runs. What
is forked is a process like any other, with its own signals, limits and end; only its hash seed, and
what libraries have read from the environment while they were imported, it shares with the others.

Requests and replies are lines of JSON, on standard input and output. When the input ends, all ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.injected import OURS, ROOT, Fault, begin

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# What is imported only when it is first used, and then takes its time.
LATE = (
    "accelerate.utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "multiprocessing.resource_tracker",
    "peft.tuners.lora",
    "torch._dynamo",
    "torch.distributed",
    "torch.utils.data",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
_STANDARD: dict[str, Any] = {"SIGINT": signal.default_int_handler, "SIGPIPE": signal.SIG_IGN}
_HEARD = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM", "SIGPIPE")


def warm_up() -> None:
    """Imports all of ours but the commands, and what they import late. Starts nothing."""
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in LATE:
        importlib.import_module(name)
    for package in OURS[:3]:
        for file in sorted((ROOT / package).glob("*.py")):
            if "__main__" not in file.read_text(encoding="utf-8"):
                with suppress(Exception):  # which a run that needs it will meet again
                    importlib.import_module(f"{package}.{file.stem}")
    for package in OURS[:3]:
        where = Path(str(sys.modules[package].__file__)).resolve()
        assert where.is_relative_to(ROOT), f"{package} is not of {ROOT} but in {where}"
    # A thread would be missing from every process that is forked, with whatever it held.
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    gc.collect()
    gc.freeze()


def serve(requests: int, replies: int) -> dict[str, Any] | None:
    """Forks a process for each request; returns the request in that process, None at the end."""
    leaders: set[int] = set()
    waiting = b""
    while True:
        readable, _, _ = select.select([requests], [], [], 0.02)
        for pid, code in ended():
            if pid in leaders:
                reply(replies, ended=pid, code=code)
        if not readable:
            continue
        data = os.read(requests, 1 << 16)
        if not data:
            kill_all(leaders)
            return None
        *lines, waiting = (waiting + data).split(b"\n")
        for line in lines:
            if line == b"end":
                kill_all(leaders)
                return None
            pid = os.fork()
            if pid == 0:
                os.close(requests)
                os.close(replies)
                return json.loads(line)
            leaders.add(pid)
            reply(replies, started=pid)


def reply(replies: int, **content: int) -> None:
    os.write(replies, (json.dumps(content) + "\n").encode())


def ended() -> list[tuple[int, int]]:
    """Process and exit code, -N for signal N, of all children that have ended, adopted ones too."""
    found = []
    with suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            found.append((child[0], os.waitstatus_to_exitcode(child[1])))
    return found


def kill_all(leaders: set[int]) -> None:
    for leader in leaders:
        with suppress(OSError):
            os.killpg(leader, signal.SIGKILL)


def become(request: dict[str, Any]) -> None:
    """Makes this process what one that was started for the request would be."""
    os.setsid()
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in _HEARD:
        signal.signal(signal.Signals[name], _STANDARD.get(name, signal.SIG_DFL))
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(output, number)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    _draw_anew()
    for number, soft, hard in request["limits"]:
        resource.setrlimit(number, (soft, hard))


def _draw_anew() -> None:
    """Python and numpy seed themselves from the system in every new process."""
    import numpy as np

    random.seed()
    np.random.seed()


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)


def main() -> None:
    replies = os.dup(1)
    os.dup2(2, 1)  # what imports print is no reply
    requests = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    warm_up()
    reply(replies, ready=os.getpid())
    request = serve(requests, replies)
    if request is None:
        return
    become(request)
    # The interpreter then ends as it does after any script: threads, atexit, exit code.
    begin(
        Path(request["entry"]),
        request["arguments"],
        [Fault(**fault) for fault in request["faults"]],
    )


if __name__ == "__main__":
    main()
