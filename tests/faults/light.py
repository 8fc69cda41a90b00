"""Commands that must end before anything heavy is imported, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.runs import ROOT

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft")
_RUN = """
import runpy, sys
heavy, sys.argv = sys.argv[1].split(), sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("heavy modules:", *(name for name in heavy if name in sys.modules), flush=True)
"""


def finish(
    entry: str, *arguments: str, code: int = 0, within: Sequence[str] = ()
) -> tuple[str, str]:
    """What an entry says on stdout and stderr that ends with `code`, without a heavy import or a
    traceback; within: what to put before the command."""
    command = [sys.executable, "-c", _RUN, " ".join(HEAVY), str(ROOT / entry), *arguments]
    result = subprocess.run(
        [*within, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = result.stdout + result.stderr
    assert result.returncode == code, said
    assert "Traceback" not in said
    assert "heavy modules:\n" in result.stdout, said
    return result.stdout, result.stderr


def complaint(entry: str, *arguments: str, within: Sequence[str] = ()) -> str:
    """The one line on stderr, but for progress bars, of an entry that refuses with exit code 2."""
    _, said = finish(entry, *arguments, code=2, within=within)
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and said.count("error: ") == 1, said
    return line


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by name; None for folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
