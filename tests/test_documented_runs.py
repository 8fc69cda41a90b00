"""The commands of the pages, run as they stand, those of sh blocks in their order and then those in
the running text, in a folder where everything they name is there: tiny models in place of published
ones, training with dry_run=true. A command of an entry that no rule covers fails."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from pathlib import Path

import pytest

from tests import documented, documented_check, documented_world
from tests.documented import Command
from tests.hub_stand_in import TOKEN, running
from tests.test_documented_commands import LAUNCHERS, OTHERS
from train import screens
from train.config import ROOT

pytestmark = pytest.mark.slow

DRY = ["dry_run=true", "output=dry"]  # of the world's finished runs each has one already
FEW = ["evaluation.steps=1", "evaluation.images=8", "evaluation.per_prompt=1"]
FEW += [f"evaluation.clip={ROOT / 'data/assets/toy-clip'}", "evaluation.batch_size=16"]
# By entry, what makes it cheap enough; later words win.
RULES: dict[str, list[str]] = {
    "train/lora.py": DRY,
    "train/dreambooth.py": DRY,
    "train/textual_inversion.py": DRY,
    "train/full.py": DRY,
    "scripts/sweep.py": ["dry_run=true"],
    "eval/evaluate.py": FEW,
    "eval/compare.py": [],
    "scripts/adapters.py": [],
    "scripts/cache.py": [],
    "scripts/caption.py": [],
    "scripts/completion.py": [],
    "scripts/depth.py": [],
    "scripts/export.py": [],
    "scripts/generate.py": ["steps=2"],
    "scripts/init.py": ["yes=true"],
    "scripts/plan.py": [],
    "scripts/prepare.py": [],
    "scripts/prior_images.py": ["count=2", "steps=1"],
    "scripts/reference.py": ["output=configuration.md"],
    "scripts/runs.py": [],
    "scripts/watermark.py": [],
    "scripts/toy/world.py": ["count=2"],
}
# Not run here, and where they are instead: each measures for minutes, or writes gigabytes.
ELSEWHERE = {
    "scripts/benchmark.py": "tests/test_benchmark.py and the tests of each benchmark",
    "docs/examples/add_method.py": "tests/test_extending.py",
    "docs/examples/add_source.py": "tests/test_extending.py",
    "docs/examples/add_metric.py": "tests/test_extending.py",
    "scripts/toy/full_size.py": "tests/test_full_size.py",
    "scripts/toy/measure.py": "tests/test_toy.py",
}
PAGES = [page for page in documented.documents() if page.name != "README.zh.md"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return documented_world.make(tmp_path_factory.mktemp("template"))


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    folder = documented_world.copy(template, tmp_path / "world")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return folder


def launched(command: Command) -> tuple[str, list[str]] | None:
    """The entry and arguments to be run; None for what is looked at elsewhere."""
    words = command.words
    if words[0] in OTHERS or words[1] in ("-c", "-m"):
        return None
    assert words[0] in LAUNCHERS, f"no rule for `{words[0]}`"
    entry, arguments = documented_check.entry_of(words)
    if entry in ELSEWHERE:
        assert all((ROOT / w).is_file() for w in ELSEWHERE[entry].split() if w.endswith(".py"))
        return None
    assert entry in RULES, f"say in RULES how {entry} is run"
    arguments = screens.split(arguments)[0]
    return entry, arguments if "--help" in arguments else [*arguments, *RULES[entry]]


def run(entry: str, arguments: list[str]) -> None:
    """An entry's main, in this process. Raises AssertionError with what it said."""
    from accelerate.state import AcceleratorState, PartialState

    module = importlib.import_module(entry.removesuffix(".py").replace("/", "."))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module.main(arguments)
    except SystemExit as ended:
        assert not ended.code, said.getvalue()
    except Exception as error:
        raise AssertionError(
            f"{type(error).__name__}: {error}\n{said.getvalue()[-1500:]}"
        ) from error
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def prepare(arguments: list[str]) -> None:
    """What a person would have done in between: votes of the page that was just written."""
    for word in arguments:
        key, _, value = word.partition("=")
        if key == "votes":
            for name in value.strip("[]").split(","):
                documented_world.vote(Path("rating.key.json"), Path(name.strip()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, world, monkeypatch):
    failed = []
    with running() as hub:
        hub_at(hub.address, monkeypatch)
        for command in [*documented.commands_of(page), *documented.inline_commands(page)]:
            try:
                if found := launched(command):
                    prepare(found[1])
                    run(*found)
            except AssertionError as error:
                failed.append(f"{command}\n    {error}")
    assert not failed, "\n\n".join(failed)


def hub_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads go to the stand-in."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
