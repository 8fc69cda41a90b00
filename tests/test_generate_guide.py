"""The commands of docs/generate.md."""

import re
import shlex

import pytest

from scripts import generate
from scripts.generation.config import GenerateConfig
from train.config import ROOT, load

TEXT = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [
    shlex.split(command)
    for block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("python scripts/generate.py")
]


def configuration(command):
    arguments = command[command.index("scripts/generate.py") + 1 :]
    return load(GenerateConfig, [generate.spelled_out(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_every_command_is_a_valid_configuration(command):
    assert configuration(command).prompt or configuration(command).prompts


def test_those_on_the_toy_world_run(tmp_path):
    made = 0
    for config in map(configuration, COMMANDS):
        if config.model.path != "data/assets/toy-base" or config.adapters:
            continue
        image = config.image and tmp_path / config.image.relative_to("pictures")
        places = {"output": tmp_path / config.output.relative_to("pictures"), "image": image}
        made += len(generate.make_pictures(config.model_copy(update={"steps": 2, **places})))
    assert made == 3 + 4


def test_the_table_of_presets_has_their_numbers():
    rows = re.findall(r"generate/(\w+)\.yaml\) \|[^|]*\| (\S+) \| (\S+) \| (\d+) \|", TEXT)
    assert len(rows) == 4
    for name, *numbers in rows:
        file = ROOT / f"configs/generate/{name}.yaml"
        values = ["--config", str(file), "output=x", "prompt=x", "image=x"]
        config = load(GenerateConfig, values)
        assert [config.strength, config.guidance, config.steps] == [float(n) for n in numbers]
