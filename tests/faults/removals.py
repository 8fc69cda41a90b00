"""What holds each case of docs/reliability.md, taken away: its tests must then fail.

    python -m tests.faults.removals          # every case; takes hours
    python -m tests.faults.removals 5 14     # some of them

A test file of tests/faults names what its case is held by in WITHOUT. Each of these is removed from
a copy of the source tree, and the file's tests are run there; so they are with nothing removed, to
see them pass. A test that stays green without what it is there for holds nothing.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
CASES = range(1, 32)
_SECONDS = 1800  # of one case's tests


class Removal(NamedTuple):
    """A protection that is taken away by changing one place of one file."""

    what: str
    """In words, for the table."""
    file: str
    """Within the repository."""
    old: str
    """Stands in it exactly once."""
    new: str
    tests: str = ""
    """Which of the file's tests it must turn red, as for pytest -k; one of all, where empty."""


class Outcome(NamedTuple):
    """Of one case's tests."""

    code: int
    """pytest's: 0 all passed, 1 some failed, others mean that they did not run."""
    said: str
    """Which failed and why, in a line."""


def files_of(case: int) -> list[Path]:
    """The test files of a case: there is to be one."""
    return sorted((ROOT / "tests/faults").glob(f"test_case_{case:02d}_*.py"))


def removals_of(file: Path) -> list[Removal]:
    return list(importlib.import_module(f"tests.faults.{file.stem}").WITHOUT)


def misfits(removal: Removal) -> str | None:
    """Why a removal cannot be made, None if it can."""
    path = ROOT / removal.file
    if not path.is_file():
        return f"{removal.file} is not there"
    count = path.read_text(encoding="utf-8").count(removal.old)
    if count != 1:
        return f"{removal.file} has {removal.old!r} {count} times"
    return None if removal.new != removal.old else f"{removal.what} changes nothing"


def copy_tree(folder: Path) -> None:
    """The files that git knows of, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(tree: Path, test: Path, chosen: str = "") -> Outcome:
    """Runs one file's tests, slow ones too, in a copy of the tree and with its modules.

    chosen: which of them, as for pytest -k.
    """
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    asked = "import train.config as c; print(c.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", asked], cwd=tree, env=env, capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(tree), "the copy's modules are not imported"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += [
        "-m",
        "",
        "-k",
        chosen,
        f"--basetemp={tree}-tests",
        str(tree / test.relative_to(ROOT)),
    ]
    process = subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Outcome(-1, f"not in {_SECONDS} s")
    finally:
        shutil.rmtree(f"{tree}-tests", ignore_errors=True)
    failed = re.findall(r"^(?:FAILED|ERROR) [^:\n]*::(.*)$", output, re.MULTILINE)
    last = output.strip().splitlines()[-1:]
    return Outcome(process.returncode, (failed or last or [""])[0][:160])


def outcomes(case: int) -> Iterator[tuple[str, bool, str]]:
    """What was removed, whether the tests were as they should be, and what they said."""
    files = files_of(case)
    if not files:
        yield "-", False, "there is no test file"
    for test in files:
        with tempfile.TemporaryDirectory(prefix="without-") as folder:
            tree = Path(folder).resolve() / "tree"
            copy_tree(tree)
            removals = removals_of(test)
            chosen = {removal.tests for removal in removals}
            whole = run_tests(tree, test, "" if "" in chosen else " or ".join(sorted(chosen)))
            green = whole.code == 0
            yield "nothing", green, "green" if green else f"NOT GREEN: {whole.said}"
            for removal in removals:
                yield removal.what, *_without(removal, tree, test)


def _without(removal: Removal, tree: Path, test: Path) -> tuple[bool, str]:
    if why := misfits(removal):
        return False, why
    file = tree / removal.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(removal.old, removal.new), encoding="utf-8")
    try:
        found = run_tests(tree, test, removal.tests)
    finally:
        file.write_text(text, encoding="utf-8")
    if found.code == 0:
        return False, "STILL GREEN"
    return found.code == 1, f"{'red' if found.code == 1 else 'NOT RUN'}: {found.said}"


def main(arguments: list[str]) -> int:
    """0 if the tests of all cases are green as they are, and red without each protection."""
    well = True
    for case in map(int, arguments or map(str, CASES)):
        for what, good, said in outcomes(case):
            print(f"{case:>2} | {what} | {said}", flush=True)
            well = well and good
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
