"""Runs an entry in which something goes wrong that no Fault brings about:

    python tests/faults/spoiled.py '{"what": "gradient", "call": 3}' train/lora.py key=value ...

what: one of SPOILED. call: of what it strikes, counted from 1. rank: only in this process of
several.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def spoiled(what: str, call: int = 1, rank: int | None = None) -> list[str]:
    """What stands before an entry and its arguments to have it spoiled."""
    return ["tests/faults/spoiled.py", json.dumps({"what": what, "call": call, "rank": rank})]


def gradient(call: int) -> None:
    """That of a forward pass, whose losses are finite, is not."""
    from train.denoiser import Denoiser

    def then(losses: Any) -> None:
        losses.register_hook(lambda gradient: gradient * float("nan"))

    _strike(Denoiser, "forward", call, then)


def loss(call: int) -> None:
    """Those of a forward pass are not finite, and their gradient is."""
    from train.denoiser import Denoiser

    _strike(Denoiser, "forward", call, lambda losses: losses + float("nan"))


def memory(call: int) -> None:
    """A forward pass wants more of torch's allocator than any machine has."""
    import torch

    from train.denoiser import Denoiser

    _strike(Denoiser, "forward", call, lambda _: torch.empty(2**50))


def update(call: int) -> None:
    """One never comes."""
    from accelerate.optimizer import AcceleratedOptimizer

    _strike(AcceleratedOptimizer, "step", call, instead=True)


def weights(call: int) -> None:
    """One of them is not finite once the optimizer has stepped."""
    from accelerate.optimizer import AcceleratedOptimizer

    _strike(AcceleratedOptimizer, "step", call, _spoil_one_weight())


def result(call: int) -> None:
    """One weight is not finite, of those that are final."""
    from train.pauses import Pause

    _strike(Pause, "settle", call, _spoil_one_weight())


def group(call: int) -> None:
    """SIGTERM in a step to the whole group of processes, the loader's among them, from outside."""
    from train import loop

    command = ["kill", "-s", "TERM", "--", f"-{os.getpgid(0)}"]
    _strike(loop, "accumulate", call, lambda _: _run(command))


def leaving(call: int) -> None:
    """SIGTERM on the way out, when nothing is left to do."""
    atexit.register(os.kill, os.getpid(), signal.SIGTERM)


def slow(call: int) -> None:
    """Every batch that is cached takes two seconds."""
    from data import cache

    original = cache._encode_batch

    def function(*arguments: Any) -> Any:
        moments = original(*arguments)
        time.sleep(2)
        return moments

    cache._encode_batch = function


def late(call: int) -> None:
    """Every checkpoint is a second late."""
    from train.checkpoint import Checkpoints

    original: Any = Checkpoints._put

    def function(*arguments: Any) -> None:
        time.sleep(1)
        original(*arguments)

    Checkpoints._put = function  # type: ignore[method-assign]


def impatient(call: int) -> None:
    """Nobody waits for more than three seconds for the others to start."""
    from train import stopping

    stopping._JOIN_SECONDS = 3.0


_ALL = (gradient, loss, memory, update, weights, result, group, leaving, slow, late, impatient)
SPOILED = {one.__name__: one for one in _ALL}


def _spoil_one_weight() -> Callable[[Any], None]:
    from train.pauses import Pause

    methods: list[Any] = []
    begin: Any = Pause.__init__

    def function(self: Any, method: Any, *arguments: Any, **keywords: Any) -> None:
        methods.append(method)
        begin(self, method, *arguments, **keywords)

    Pause.__init__ = function  # type: ignore[method-assign]

    def then(_: Any) -> None:
        weight = next(p for p in methods[0].model.parameters() if p.requires_grad)
        weight.data.view(-1)[0] = float("nan")

    return then


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, start_new_session=True)


def _strike(
    owner: Any,
    name: str,
    call: int,
    then: Callable[[Any], Any] = lambda _: None,
    *,
    instead: bool = False,
) -> None:
    """Has `then` look at what one call of a function gives, or give something else; or leaves out
    that call, `instead`."""
    original, calls = getattr(owner, name), 0

    def function(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if instead and calls == call:
            return None
        given = original(*arguments, **keywords)
        changed = then(given) if calls == call else None
        return given if changed is None else changed

    setattr(owner, name, function)


def main() -> None:
    how, entry, *arguments = sys.argv[1:]
    wanted = json.loads(how)
    sys.path[:1] = [str(ROOT / "train"), str(ROOT)]
    sys.argv = [str(ROOT / entry), *arguments]
    if wanted["rank"] in (None, int(os.environ.get("RANK", "0"))):
        SPOILED[wanted["what"]](wanted["call"])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
