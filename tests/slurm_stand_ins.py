"""SLURM's srun and scontrol as far as the templates of scripts/slurm need them: srun starts its
tasks, passes a signal on to all of their processes, and ends with their highest exit code; scontrol
notes what it is asked for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SRUN = '''
import os, signal, subprocess, sys
from pathlib import Path

arguments = sys.argv[1:]
options = []
while arguments[0].startswith("-"):
    options.append(arguments.pop(0))

tasks = []

def sessions():
    """The session of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[3])
        except OSError:
            pass

def pass_on(number, frame):
    ours = {task.pid for task in tasks}
    for pid, session in list(sessions()):
        if session in ours:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

signal.signal(signal.SIGUSR1, pass_on)
signal.signal(signal.SIGTERM, pass_on)
for number in range(int(os.environ["SLURM_NTASKS"])):
    named = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    task = subprocess.Popen(arguments, env=os.environ | named, start_new_session=True)
    tasks.append(task)
(Path(__file__).parent / "srun.pid").write_text(str(os.getpid()))
(Path(__file__).parent / "srun.options").write_text(" ".join(options))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
'''

SCONTROL = """
import sys
from pathlib import Path

folder = Path(__file__).parent
if sys.argv[1:3] == ["show", "hostnames"]:
    print(sys.argv[3].replace(",", "\\n"))
elif sys.argv[1:3] == ["show", "job"]:
    print((folder / "job").read_text() if (folder / "job").exists() else "PreemptTime=None")
else:
    with (folder / "asked").open("a") as file:
        print(*sys.argv[1:], file=file)
"""


class Slurm:
    """A folder with the stand-ins, and a job that runs with them in PATH."""

    def __init__(self, folder: Path, *, tasks: int = 1) -> None:
        self.folder, self._tasks = folder, tasks
        folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(f"#!{sys.executable}\n{text}")
            (folder / name).chmod(0o755)

    def asked(self) -> list[str]:
        """What scontrol was to do."""
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def options(self) -> str:
        return (self.folder / "srun.options").read_text()

    def srun(self) -> int | None:
        """The process of srun, once its tasks run."""
        file = self.folder / "srun.pid"
        text = file.read_text() if file.exists() else ""
        return int(text) if text else None

    def preempt(self) -> None:
        (self.folder / "job").write_text("JobState=RUNNING PreemptTime=2030-01-01T00:00:00 x=1")

    def submit(
        self, template: str, *arguments: str, python: str = sys.executable, restarts: int = 0
    ) -> subprocess.Popen[str]:
        """The batch script as SLURM starts it, in a session of its own."""
        (self.folder / "srun.pid").unlink(missing_ok=True)
        job = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHON": python,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4321",
            "SLURM_JOB_NODELIST": "127.0.0.1,node2",
            "SLURM_NTASKS": str(self._tasks),
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts/slurm" / template), *arguments],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | job,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def directives(template: str) -> dict[str, str]:
    """The #SBATCH lines, which SLURM reads up to the first command."""
    text = (ROOT / "scripts/slurm" / template).read_text()
    head = re.split(r"^(?!#|$)", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, flags=re.MULTILINE)
    return dict(found)
