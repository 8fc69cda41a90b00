"""How the runs of a sweep are started: some at a time on this machine, or as an array of SLURM
jobs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from scripts.sweeping import SweepRun
from train import stopping
from train.config import UserError

_TEMPLATE = "scripts/slurm/array.sbatch"
_STOPPED = (129, 130, 138, 143)  # exit codes of runs that saved and can go on


class Local:
    """Runs on this machine, `parallel` at a time. What they print goes into LOGS/NAME.log."""

    def __init__(self, launcher: Sequence[str], logs: Path, *, parallel: int) -> None:
        self._launcher = list(launcher) or [sys.executable]
        self._logs, self._parallel = logs, parallel
        self._gpus = visible_gpus() if parallel > 1 else []
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._stopping = 0  # the signal that says so

    def run(self, runs: Sequence[SweepRun]) -> dict[str, int]:
        """The exit code of every run that was started, by its name. One that fails does not keep
        the others; a signal that asks to end ends those that run, which save, and starts no
        more."""
        waiting: SimpleQueue[tuple[int, SweepRun]] = SimpleQueue()
        for item in enumerate(runs, 1):
            waiting.put(item)
        codes: dict[str, int] = {}
        work = [
            Thread(target=self._work, args=(slot, waiting, codes, len(runs)))
            for slot in range(min(self._parallel, len(runs)))
        ]
        with self._passing_signals_on():
            for thread in work:
                thread.start()
            for thread in work:
                while thread.is_alive():
                    thread.join(0.2)  # a signal is heard between two
        return codes

    def _work(
        self,
        slot: int,
        waiting: SimpleQueue[tuple[int, SweepRun]],
        codes: dict[str, int],
        total: int,
    ) -> None:
        with suppress(Empty):
            while not self._stopping:
                number, run = waiting.get_nowait()
                since = time.monotonic()
                codes[run.name] = self._one(run, slot)
                took = time.monotonic() - since
                log = self._logs / f"{run.name}.log"
                said = ended(codes[run.name], log)
                with suppress(OSError):  # the terminal is closed
                    print(f"{number}/{total}  {run.name}: {said}, {took:.0f} s", flush=True)

    def _one(self, run: SweepRun, slot: int) -> int:
        environment = dict(os.environ)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{run.name}.log").open("ab") as log:
            with self._lock:
                if self._stopping:
                    return _STOPPED[0]
                process = subprocess.Popen(
                    [*self._launcher, *run.words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # signals come by way of us, once
                )
                self._running.add(process)
                if self._stopping:  # since it was started
                    process.send_signal(self._stopping)
            code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code if code >= 0 else 128 - code

    @contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            # A launcher may know no other than these two.
            self._stopping = number if number == signal.SIGINT else signal.SIGTERM
            for process in list(self._running):
                with suppress(ProcessLookupError):
                    process.send_signal(self._stopping)

        heard = [n for n in stopping.SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def ended(code: int, log: Path) -> str:
    """An exit code in words."""
    if code == 0:
        return "done"
    if code in _STOPPED:
        return "interrupted, the same command goes on"
    return f"failed with exit code {code}, see {log}"


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; none where there is no NVIDIA driver."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = [line for line in said.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(gpus))]


def submit(
    runs: Sequence[SweepRun], folder: Path, *, at_once: int | None, options: Sequence[str]
) -> Mapping[str, str]:
    """Hands runs to SLURM as one array of jobs; returns the job's number and the file of its lines.
    Raises UserError where there is no sbatch, or it refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    # Jobs of an earlier array may still have to read theirs.
    taken = len(list(folder.glob("runs-*.txt")))
    file = folder / f"runs-{taken + 1}.txt"
    file.write_text("".join(shlex.join(run.words) + "\n" for run in runs), encoding="utf-8")
    array = f"--array=0-{len(runs) - 1}" + (f"%{at_once}" if at_once else "")
    command = ["sbatch", "--parsable", array, *options, _TEMPLATE, str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("launch=slurm: there is no sbatch here; use launch=local") from None
    if done.returncode:
        raise UserError(f"launch=slurm: sbatch refused ({done.stderr.strip()})")
    return {"job": done.stdout.strip(), "file": str(file)}
