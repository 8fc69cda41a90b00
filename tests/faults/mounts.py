"""File systems of a process's own: small ones and read-only ones, in a user namespace, which needs
no root.

    unshare --map-root-user --mount python mounts.py FOLDER OPTIONS COPIED COMMAND...

mounts over FOLDER, runs the command and prints what it left below FOLDER.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

READ_ONLY = "ro"
LEFT = "left below it:"


def _can_mount() -> bool:
    try:
        return not subprocess.run([*_namespace(), "true"], capture_output=True).returncode
    except OSError:
        return False


def _namespace() -> list[str]:
    return ["unshare", "--map-root-user", "--mount"]


needs_mounts = pytest.mark.skipif(
    not _can_mount(), reason="the kernel allows no user namespaces here (unshare -rm true fails)"
)


def small(folder: Path, size: str, *, copied: Path | None = None) -> list[str]:
    """What to put before a command for a tmpfs of `size` (like 4m) to lie over `folder`, with a
    copy of the folder `copied` in it."""
    source = "" if copied is None else str(copied)
    return [*_namespace(), sys.executable, __file__, str(folder), f"size={size}", source]


def read_only(folder: Path) -> list[str]:
    """What to put before a command for `folder` to be read-only."""
    return [*_namespace(), sys.executable, __file__, str(folder), READ_ONLY, ""]


def main(folder: str, options: str, copied: str, *command: str) -> int:
    if options == READ_ONLY:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    else:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    if copied:
        shutil.copytree(copied, folder, dirs_exist_ok=True)
    code = subprocess.run(command).returncode
    print(LEFT, *sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*")), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
