"""Every command in README, docs/ and at the head of entries and configurations.

Each is read by the launcher's and the entry's own parser (fast). Each of a page's sh blocks is also
run, in order, in a folder laid out as the page says, on tiny models; training with dry_run=true
(slow). A new kind of command fails until a rule below says how it is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests import documented, documented_check
from tests.documented import Command, Words
from train.config import ROOT

PAGES = documented.documents()
HEADS = [
    *sorted(
        file for folder in ("train", "eval", "scripts") for file in (ROOT / folder).rglob("*.py")
    ),
    *sorted((ROOT / "configs").rglob("*.yaml")),
]
LAUNCHERS = ("accelerate", "python", "torchrun", "sbatch")


def nothing_more(words: Words) -> None:
    """Of another program, or of the shell: its files, if it names any, are looked for."""


def kubectl(words: Words) -> None:
    """The manifest is there and is one."""
    for word in words:
        if word.endswith((".yaml", ".yml")):
            documented_check.check_manifest(word)


def docker(words: Words) -> None:
    for option, name in itertools.pairwise(words):
        if option in ("-f", "--file"):
            assert (ROOT / name).is_file(), f"{name} is not there"


# Commands that are not run here, and how each is looked at instead.
OTHERS: dict[str, Callable[[Words], None]] = {
    "make": documented_check.check_target,
    "kubectl": kubectl,
    "docker": docker,
    "hf": nothing_more,
    "python3": nothing_more,  # `make setup` makes the environment that .ci/run tests in
    "source": nothing_more,
    "cd": nothing_more,
    "git": nothing_more,
    "pip": nothing_more,
    "wandb": nothing_more,
    "tensorboard": nothing_more,
    "trackio": nothing_more,
}


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command.words
    documented_check.check_files(words)
    if words[0] in OTHERS:
        OTHERS[words[0]](words)
        return
    if words[0] == "python" and words[1] in ("-c", "-m"):
        documented_check.check_python(*words[1:3])
        return
    assert words[0] in LAUNCHERS, f"say in OTHERS how `{words[0]}` is looked at"
    entry, arguments = documented_check.entry_of(words)
    documented_check.check_entry(entry, arguments, monkeypatch)


def problems(commands: list[Command], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = []
    for command in commands:
        try:
            check(command, monkeypatch)
        except (AssertionError, SystemExit) as error:
            found.append(f"{command}\n    {error}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_program_takes(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [*documented.commands_of(page), *documented.inline_commands(page)]
    assert not (found := problems(commands, monkeypatch)), "\n".join(found)


def test_so_is_every_command_at_the_head_of_a_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [command for file in HEADS for command in documented.usage_lines(file)]
    assert len(commands) > 60
    assert not (found := problems(commands, monkeypatch)), "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_sh_blocks_where_a_test_sees_them(page):
    for block in documented.unnamed_blocks(page.read_text("utf-8")):
        shown = [line for line in block.splitlines() if line.startswith(LAUNCHERS)]
        assert not shown, f"{page.name}: give the block its language, ```sh: {shown[0]}"


WRONG = {
    "a key that is none": "python train/lora.py --config configs/lora.yaml lora.rnak=8",
    "a value that is none": "accelerate launch train/lora.py lora.rank=many",
    "an entry that is not there": "python scripts/draw.py prompt=cat",
    "a file that is not there": "python train/lora.py --config configs/lorra.yaml",
    "a launcher's option": "accelerate launch --num_procs 4 train/lora.py",
    "an evaluation's key": "python eval/evaluate.py run=runs/a evaluation.guidence=3",
    "a plan's key": "python scripts/plan.py --config configs/lora.yaml crad=12",
    "a task that is none": "python scripts/adapters.py resise big.safetensors rank=8 output=small",
    "a target that is none": "make tests",
    "a program without a rule": "rm -rf /",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_command_is_found(wrong, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (words,) = documented.heard(wrong)
    assert problems([Command(ROOT / "README.md", 1, words)], monkeypatch)


def test_bash_reads_the_blocks():
    block = 'for n in 1 2; do python a.py n=$n "b c" \\\n  d=e  # not this\ndone\n'
    assert documented.heard(block) == [
        ("python", "a.py", "n=1", "b c", "d=e"),
        ("python", "a.py", "n=2", "b c", "d=e"),
    ]
    with pytest.raises(AssertionError):
        documented.heard("if true; python a.py")
