"""Real runs in processes of their own, that tests can signal, limit, starve and kill."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tests.faults.injected import ROOT, Fault, dumped

Limits = Mapping[int, tuple[int, int]]  # resource.RLIMIT_...: (soft, hard)
Launcher = Literal["torchrun", "accelerate"]
INJECTED = Path("tests/faults/injected.py")
TOKEN = "FAULTS_RUN"  # in the environment of all that a launcher starts


class Run:
    """One run: a process, or several of one run, by rank. A launcher is one process, whose own
    are not counted."""

    def __init__(self, starter: Starter, output: Path) -> None:
        self._starter, self._output = starter, output
        self.pids: list[int] = []

    @property
    def output(self) -> str:
        """What all processes have printed so far, errors too."""
        if not self._output.exists():
            return ""
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank, -N for one killed by signal N, None for one that goes on."""
        return [self._starter.code(pid) for pid in self.pids]

    @property
    def running(self) -> bool:
        return None in self.codes

    def signal(self, number: int, rank: int = 0) -> None:
        """Sends a signal, unless the process has ended."""
        if self.codes[rank] is None:
            os.kill(self.pids[rank], number)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes by rank. Fails, and kills the run, if it takes longer than so many
        seconds."""
        deadline = time.monotonic() + timeout
        while self.running:
            if time.monotonic() > deadline:
                self._fail(f"the run has not ended after {timeout} s, codes {self.codes}")
            time.sleep(0.005)
        return [code for code in self.codes if code is not None]

    def until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        """Waits until the condition holds. Fails if the run ends before, or after so many
        seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running and not condition():
                self._fail(f"the run ended before, codes {self.codes}")
            if time.monotonic() > deadline:
                self._fail(f"not in {timeout} s")
            time.sleep(0.005)

    def _fail(self, why: str) -> None:
        said = self.output
        self.kill()
        raise AssertionError(f"{why}\n{said}")

    def alive(self) -> list[int]:
        """All processes of the run that live, its workers and those of a launcher too."""
        return self._starter.alive(self)

    def kill(self) -> None:
        """Kills all that is alive of it."""
        while alive := self.alive():
            for pid in alive:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


class Starter:
    """Starts runs by forking them from a process that has imported all they need, or through a
    launcher."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self._zygote: subprocess.Popen[bytes] | None = None
        self._replies = b""
        self._started: list[int] = []
        self._codes: dict[int, int] = {}
        self._launchers: dict[int, subprocess.Popen[bytes]] = {}
        self._tokens: dict[int, str] = {}
        self._runs: list[Run] = []
        self._count = 0

    def start(
        self,
        entry: str | Path,
        *arguments: str,
        processes: int = 1,
        faults: Sequence[Fault] = (),
        limits: Limits | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        launcher: Launcher | None = None,
    ) -> Run:
        """A run of `entry`, a path within the repository.

        processes: joined as by torchrun, where there are several. env: added to this process's, or
        taken from it where None. limits: of each process. launcher: through which it is started,
        which takes seconds longer.
        """
        self._count += 1
        run = Run(self, self._folder / f"{self._count}.txt")
        self._runs.append(run)
        environment, where = _environment_with(env or {}), cwd or ROOT
        if launcher:
            command = _launched(launcher, entry, arguments, processes, faults)
            run.pids = [self._launch(command, environment, limits or {}, where, run._output)]
            return run
        port = _free_port()
        for rank in range(processes):
            joined = _joined(rank, processes, port) if processes > 1 else {}
            request = {
                "entry": str(ROOT / entry),
                "arguments": list(map(str, arguments)),
                "env": environment | joined,
                "faults": json.loads(dumped(faults)),
                "limits": [[number, *limit] for number, limit in (limits or {}).items()],
                "cwd": str(where),
                "output": str(run._output),
            }
            run.pids.append(self._fork(request))
        return run

    def finish(self, entry: str | Path, *arguments: str, code: int = 0, **options: Any) -> str:
        """Runs to the end, where every process must exit with `code`; returns what it printed.

        timeout: in seconds. Otherwise as `start`.
        """
        timeout = options.pop("timeout", 120)
        run = self.start(entry, *arguments, **options)
        codes = run.wait(timeout)
        assert set(codes) == {code}, f"exit codes {codes}\n{run.output}"
        return run.output

    def kill_all(self) -> None:
        """Kills what is alive of all runs since it was called last."""
        while self._runs:
            self._runs.pop().kill()

    def close(self) -> None:
        self.kill_all()
        if self._zygote is not None:
            assert self._zygote.stdin and self._zygote.stdout
            # Closing alone would not do where this process has forked since, and its child lives.
            self._zygote.stdin.write(b"end\n")
            self._zygote.stdin.close()
            self._zygote.wait(timeout=30)
            self._zygote.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def code(self, pid: int) -> int | None:
        """The exit code of a run's process, None while it lives."""
        if pid in self._launchers:
            return self._launchers[pid].poll()
        self._hear(0)
        return self._codes.get(pid)

    def alive(self, run: Run) -> list[int]:
        """All processes of a run that live."""
        token = self._tokens.get(run.pids[0]) if run.pids else None
        return [
            pid
            for pid in _processes()
            if _session(pid) in run.pids or (token is not None and token in _environment(pid))
        ]

    def _fork(self, request: dict[str, Any]) -> int:
        zygote = self.warm()
        assert zygote.stdin is not None
        zygote.stdin.write((json.dumps(request) + "\n").encode())
        zygote.stdin.flush()
        before = len(self._started)
        while len(self._started) == before:
            self._hear(60)
        return self._started[-1]

    def warm(self) -> subprocess.Popen[bytes]:
        """The process that forks runs, started if it is not yet there."""
        if self._zygote is None:
            errors = (self._folder / "zygote.txt").open("wb")
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.zygote"],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            errors.close()
            self._hear(120)
        return self._zygote

    def _hear(self, timeout: float) -> None:
        """Reads what the zygote has said, at least something of it within so many seconds."""
        if self._zygote is None:
            return
        stream = self._zygote.stdout
        assert stream is not None
        while select.select([stream], [], [], timeout)[0]:
            said = os.read(stream.fileno(), 1 << 16)
            if not said:
                errors = (self._folder / "zygote.txt").read_text(encoding="utf-8")
                raise RuntimeError(f"the process that forks runs has ended:\n{errors}")
            *lines, self._replies = (self._replies + said).split(b"\n")
            for line in map(json.loads, lines):
                if "started" in line:
                    self._started.append(line["started"])
                    self._codes.pop(line["started"], None)  # a number that has come round again
                elif "ended" in line:
                    self._codes[line["ended"]] = line["code"]
            if lines:
                return

    def _launch(
        self, command: list[str], env: dict[str, str], limits: Limits, cwd: Path, output: Path
    ) -> int:
        def begin() -> None:
            # What started pytest may have had it ignore SIGINT, and that is inherited.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            for kind, limit in limits.items():
                resource.setrlimit(kind, limit)

        token = uuid.uuid4().hex
        with output.open("ab") as stream:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=env | {TOKEN: token},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=begin,
            )
        self._launchers[process.pid] = process
        self._tokens[process.pid] = token
        return process.pid


def _launched(
    launcher: Launcher,
    entry: str | Path,
    arguments: Sequence[str],
    processes: int,
    faults: Sequence[Fault],
) -> list[str]:
    """The command line of a launcher."""
    if launcher == "torchrun":
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    else:
        start = ["-m", "accelerate.commands.launch", "--cpu", f"--num_processes={processes}"]
        start += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        start += [f"--main_process_port={_free_port()}"] if processes > 1 else []
    struck = [str(ROOT / INJECTED), dumped(faults), str(entry)]
    script = struck if faults else [str(ROOT / entry)]
    return [sys.executable, *start, *script, *map(str, arguments)]


def _environment_with(changes: Mapping[str, str | None]) -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONUNBUFFERED": "1"}
    for name, value in (dict(changes) | {"PYTEST_CURRENT_TEST": None}).items():
        environment.pop(name, None)
        environment |= {} if value is None else {name: value}
    return environment


def _joined(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _session(pid: int) -> int | None:
    """The session of a process; None for one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, _, _, session = stat.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else int(session)


def _environment(pid: int) -> str:
    """What a process was started with, empty where that cannot be told or it has ended."""
    if _session(pid) is None:
        return ""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""
