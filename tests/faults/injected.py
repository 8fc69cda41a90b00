"""Faults that strike a run from inside, at a chosen call of a chosen function, and records of what
passes through one. They are put around functions in the run's own process: the code of the project
knows nothing of them.

    python tests/faults/injected.py '[{"at": ..., "do": ...}]' train/lora.py ...   # for launchers
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("train", "data", "eval", "scripts")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at one call of a function, or at a few in a row.

    A process that the run forks, as the loader's workers are, has the faults too and counts its own
    calls. The function is patched wherever our modules have imported it by name.
    """

    at: str
    """module:qualname, as train.checkpoint:Checkpoints.save or os:fsync."""
    do: str
    """kill: SIGKILL to itself. SIGTERM, SIGINT, ...: that signal to itself, and goes on. hang:
    sleeps for 600 s. oom: raises torch.OutOfMemoryError. raise:OSError:28: that builtin error, of
    that number if one is given. exit:3: os._exit. nan: what the function returns times nan (after).
    record:FILE: adds a line of JSON to FILE at every call from `call` on, see `_record`."""
    call: int = 1
    """At which call, counted from 1."""
    times: int = 1
    """At how many calls from there on."""
    after: bool = False
    """When the function has returned, in place of before it is called."""
    rank: int | None = None
    """Only in this process of several."""

    def strikes(self, call: int) -> bool:
        return self.call <= call and (call < self.call + self.times or self.do.startswith("record"))


def record(file: Path, at: str, *, after: bool = False) -> Fault:
    """Writes down every call of a function, read by `recorded`."""
    return Fault(at=at, do=f"record:{file}", after=after)


def recorded(file: Path) -> list[dict[str, Any]]:
    """The lines that `record` wrote, in the order in which they were."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def dumped(faults: Sequence[Fault]) -> str:
    return json.dumps([asdict(fault) for fault in faults])


def inject(faults: Sequence[Fault]) -> None:
    """Patches this process; RANK says which of several it is."""
    rank = int(os.environ.get("RANK", "0"))
    mine = [fault for fault in faults if fault.rank in (None, rank)]
    for at in dict.fromkeys(fault.at for fault in mine):
        _patch(at, [fault for fault in mine if fault.at == at])


def _patch(at: str, faults: list[Fault]) -> None:
    module, _, qualname = at.partition(":")
    *path, name = qualname.split(".")
    owner: Any = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original = inspect.getattr_static(owner, name)
    if isinstance(original, staticmethod | classmethod):
        setattr(owner, name, type(original)(_struck(original.__func__, faults)))
        return
    struck = _struck(original, faults)
    setattr(owner, name, struck)
    for other in list(sys.modules.values()):
        if getattr(other, "__name__", "").partition(".")[0] in OURS:
            for alias, value in list(vars(other).items()):
                if value is original:
                    setattr(other, alias, struck)


def _struck(original: Callable[..., Any], faults: list[Fault]) -> Callable[..., Any]:
    counts: dict[int, itertools.count[int]] = {}

    @functools.wraps(original)
    def function(*arguments: Any, **keywords: Any) -> Any:
        call = next(counts.setdefault(os.getpid(), itertools.count(1)))
        due = [fault for fault in faults if fault.strikes(call)]
        for fault in due:
            if not fault.after:
                _do(fault, call, (arguments, keywords))
        given = original(*arguments, **keywords)
        for fault in due:
            if fault.after:
                given = _do(fault, call, (arguments, keywords), given)
        return given

    return function


def _do(fault: Fault, call: int, arguments: Any, given: Any = None) -> Any:
    """What the function gives then."""
    what, _, detail = fault.do.partition(":")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what == "hang":
        time.sleep(600)
    elif what == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    elif what == "raise":
        raise _error(detail)
    elif what == "exit":
        os._exit(int(detail))
    elif what == "nan":
        return _times_nan(given)
    elif what == "record":
        _record(Path(detail), fault, call, arguments, given)
    else:
        raise ValueError(f"no fault: {fault.do}")
    return given


def _error(detail: str) -> BaseException:
    name, _, number = detail.partition(":")
    kind = getattr(builtins, name)
    return kind(int(number), os.strerror(int(number))) if number else kind("injected")


def _times_nan(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value * float("nan") if value.is_floating_point() else value
    if isinstance(value, float):
        return float("nan")
    if isinstance(value, dict):
        return {name: _times_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_times_nan, value))
    return value


def _record(file: Path, fault: Fault, call: int, arguments: Any, given: Any) -> None:
    """One line: which call of what in which process, its arguments ("given", by position and
    "named"), and what it "gives" if that is awaited (`after`)."""
    line = {
        "at": fault.at,
        "call": call,
        "rank": int(os.environ.get("RANK", "0")),
        "pid": os.getpid(),
        "given": described(list(arguments[0])),
        "named": described(arguments[1]),
        "gives": described(given),
    }
    with file.open("ab", buffering=0) as stream:  # one write, which is whole or absent
        stream.write((json.dumps(line) + "\n").encode())


def described(value: Any) -> Any:
    """As JSON: tensors of one dimension are lists of their numbers, larger ones lists of shape and
    hash of each row, other objects the name of their kind."""
    import torch

    if isinstance(value, torch.Tensor):
        whole = value.detach().cpu()
        return whole.tolist() if whole.ndim < 2 else [_hash(row) for row in whole]
    if isinstance(value, dict):
        return {str(name): described(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [described(one) for one in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__


def _hash(tensor: Any) -> str:
    import torch

    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    shape = "x".join(map(str, tensor.shape))
    return f"{shape}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def begin(entry: Path, arguments: Sequence[str], faults: Sequence[Fault]) -> None:
    """Runs `entry` in this process, as `python entry arguments` would but for its faults."""
    # An entry finds its own folder first, then whatever is installed, as the project is.
    sys.path[:1] = [str(entry.parent), str(ROOT)]
    sys.argv = [str(entry), *arguments]
    inject(faults)
    runpy.run_path(str(entry), run_name="__main__")


if __name__ == "__main__":
    found, script, *rest = sys.argv[1:]
    begin(ROOT / script, rest, [Fault(**fault) for fault in json.loads(found)])
