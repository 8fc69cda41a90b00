"""Whether a documented command is one that the program would take: nothing is run for it."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.documented import Words
from train import screens
from train.config import ROOT, LoraRun, UserError, load

_OURS = re.compile(r"(?:^|=)((?:configs|scripts|docs|tests|data/assets)/[\w./-]+)")
_IN_THE_REPOSITORY = ("configs/", "tests/", "data/")


class Parsed(Exception):
    """Raised in place of what an entry does once it has read its configuration."""


def entry_of(words: Words) -> tuple[str, list[str]]:
    """The entry that a command starts and its arguments, read by the launcher's own parser."""
    program, *rest = words
    if program == "python":
        return rest[0], rest[1:]
    if program == "sbatch":
        template = next(index for index, word in enumerate(rest) if word.endswith(".sbatch"))
        check_script(rest[template])
        return rest[template + 1], list(rest[template + 2 :])
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(rest)
    else:
        from accelerate.commands.launch import launch_command_parser

        assert program == "accelerate" and rest[0] == "launch", f"unknown: {' '.join(words)}"
        read = launch_command_parser().parse_args(rest[1:])
        if read.config_file:
            check_accelerate(read.config_file)
    return read.training_script, list(read.training_script_args)


def check_files(words: Words) -> None:
    """Raises AssertionError where a command names a file of the repository that is not there."""
    for word in words:
        for name in _OURS.findall(word):
            assert (ROOT / name).exists(), f"{name} is not there"


def check_python(option: str, what: str) -> None:
    """`python -c CODE` or `python -m MODULE`: it compiles, or is there."""
    if option == "-c":
        compile(what, "<documentation>", "exec")
    else:
        assert importlib.util.find_spec(what), f"no module is called {what}"


def check_script(name: str) -> None:
    """A template of SLURM, or another shell script: there, and of valid syntax."""
    said = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def check_accelerate(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(ROOT / name))


def check_manifest(name: str) -> None:
    """Every document of a Kubernetes file says what it is."""
    documents = list(yaml.safe_load_all((ROOT / name).read_text("utf-8")))
    assert documents and all({"apiVersion", "kind"} <= one.keys() for one in documents)


def check_target(words: Words) -> None:
    """`make TARGET`: the Makefile has it."""
    targets = [word for word in words[1:] if "=" not in word]
    found = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert set(targets) <= set(found), f"the Makefile has {', '.join(found)}"


def check_entry(entry: str, arguments: Words, monkeypatch: Any) -> None:
    """The entry is there and takes these arguments: keys, values and tasks. Raises AssertionError.

    The entry's own main reads them; what it would do after that is left out.
    """
    assert (ROOT / entry).is_file(), f"{entry} is not there"
    if {"--help", "-h"} & set(arguments):
        return  # tests/test_layout.py asks every entry for it
    own = READ_OTHERWISE.get(entry)
    words = _present(screens.split(list(arguments))[0])
    try:
        if own:
            own(words)
        else:
            _read_by_main(entry, words, monkeypatch)
    except UserError as error:
        raise AssertionError(f"refused: {error}") from None


def _read_by_main(entry: str, arguments: list[str], monkeypatch: Any) -> None:
    module = importlib.import_module(entry.removesuffix(".py").replace("/", "."))
    assert hasattr(module, "load"), f"{entry}: say in READ_OTHERWISE how its arguments are read"

    def and_no_more(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(module, "load", and_no_more)
        try:
            module.main(arguments)
        except Parsed:
            return
    raise AssertionError(f"{entry} read no configuration")


def _present(arguments: Words) -> list[str]:
    """Arguments without a configuration that the user is yet to write: the keys are the same."""
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--config":
            file = next(rest)
            if file.startswith(_IN_THE_REPOSITORY):
                found += [argument, file]
            else:
                found += ["data.path=pictures", f"output={Path(file).stem}"]
        else:
            found.append(argument)
    return found


def _plan(arguments: list[str]) -> None:
    from scripts.plan import split
    from scripts.planning import PlanConfig, run_config

    own, rest = split(arguments)
    config = load(PlanConfig, own)
    if "--config" in rest:
        run_config(config.method, rest)


def _evaluate(arguments: list[str]) -> None:
    from eval.folders import FoldersConfig
    from eval.inputs import split

    if any(word.startswith("images=") for word in arguments):
        load(FoldersConfig, arguments)
        return
    _, overrides = split(arguments)
    load(LoraRun, ["output=runs/a", "data.path=pictures", *overrides])


def _completion(arguments: list[str]) -> None:
    assert arguments in (["bash"], ["zsh"], ["fish"])


READ_OTHERWISE: dict[str, Callable[[list[str]], None]] = {
    "scripts/plan.py": _plan,
    "eval/evaluate.py": _evaluate,
    "scripts/completion.py": _completion,
    "docs/examples/add_source.py": lambda arguments: load(LoraRun, arguments) and None,
    "docs/examples/add_metric.py": _evaluate,
    "train/dashboard_process.py": lambda arguments: None,  # started by a run, with a tracker's name
}
"""Entries that read more than one configuration, or that of a run which is not there."""
