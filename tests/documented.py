"""The commands that the documentation shows, as bash reads them.

Every ```sh block is given to bash, in which no program is to be found: what it would have run is
written down instead. So quotes, continued lines, loops and comments mean what they mean to a user.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.config import ROOT

Words = Sequence[str]
RUNNERS = ("accelerate", "python", "torchrun", "sbatch")
_LISTEN = """
PATH=/var/empty/none
command_not_found_handle() { printf '%s\\0' "$#" "$@" >&9; }  # in one piece, for pipes
source() { command_not_found_handle source "$@"; }
cd() { command_not_found_handle cd "$@"; }
eval() { command_not_found_handle eval "$@"; }
exec 9>>"$1"
. "$2"
"""
_INLINE = re.compile(r"`((?:accelerate launch|python|torchrun|sbatch)\s[^`]+)`")


@dataclass(frozen=True)
class Command:
    """One command of one document, in words."""

    file: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {' '.join(self.words)}"


def documents() -> list[Path]:
    """All pages of the repository, its front page first."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def commands_of(page: Path) -> list[Command]:
    """The commands of a page's sh blocks, in order."""
    return [
        Command(page, line, words)
        for line, block in sh_blocks(page.read_text("utf-8"))
        for words in heard(block)
    ]


def sh_blocks(text: str) -> list[tuple[int, str]]:
    """(line, content) of each ```sh block."""
    found = re.finditer(r"^```(?:sh|bash|shell)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


def unnamed_blocks(text: str) -> list[str]:
    """Blocks of code of no named language, which no test runs."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in fences if not language]


def without_code(text: str) -> str:
    """A page with its blocks of code blank, line by line."""
    blocks = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    return blocks.sub(lambda match: "\n" * match[0].count("\n"), text)


def inline_commands(page: Path) -> list[Command]:
    """Commands in the running text, but for those that leave something to be filled in."""
    prose = without_code(page.read_text("utf-8"))
    return [
        Command(page, prose.count("\n", 0, match.start()) + 1, words)
        for match in _INLINE.finditer(prose)
        if ".py" in match[1] and "..." not in match[1] and "NAME.py" not in match[1]
        for words in heard(" ".join(match[1].split()))
    ]


def usage_lines(file: Path) -> list[Command]:
    """The commands at the head of an entry (its docstring) or of a YAML file (its comments)."""
    text = file.read_text("utf-8")
    if file.suffix == ".py":
        head = ast.get_docstring(ast.parse(text)) or ""
    else:
        head = "\n".join(re.findall(r"^# ?(.*)$", text.split("\n\n")[0], re.MULTILINE))
    head = re.sub(r"\\\n\s*", " ", head)
    lines = [line.strip() for line in head.splitlines()]
    shown = [line for line in lines if line.startswith(RUNNERS) and ".py" in line]
    return [
        Command(file, 1, words)
        for line in shown
        for words in heard(re.sub(r"\[key=.*|\[output=\w+\]", "", line))
    ]


def heard(script: str) -> list[tuple[str, ...]]:
    """The words of each program that bash would start. Raises AssertionError for bad syntax."""
    with tempfile.TemporaryDirectory() as folder:
        record, block = Path(folder, "record"), Path(folder, "block")
        record.touch()
        block.write_text(script, encoding="utf-8")
        bash = ["/bin/bash", "-c", _LISTEN, "bash", str(record), str(block)]
        said = subprocess.run(bash, cwd=folder, stderr=subprocess.PIPE, text=True).stderr
        assert not said, f"bash says {said!r} of:\n{script}"
        words = record.read_text("utf-8").split("\0")[:-1]
    return _cut(words)


def _cut(words: list[str]) -> list[tuple[str, ...]]:
    found = []
    while words:
        end = 1 + int(words[0])
        found.append(tuple(words[1:end]))
        words = words[end:]
    return found
