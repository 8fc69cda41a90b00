"""scripts/completion.py: what a shell offers."""

import subprocess

import pytest

from scripts import completion
from train.config import ROOT, UserError


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "completion.bash"
    file.write_text(completion.bash(completion.all_keys()))
    return file


def offered(script, line: str) -> list[str]:
    """What bash offers at the end of a line."""
    driver = (
        f"source {script}; COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; "
        'read -ra COMP_WORDS <<< "$COMP_LINE"; _sd_atelier; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", driver], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "line, words",
    [
        ("accelerate launch train/lora.py lora.r", ["lora.rank=", "lora.rank_stabilised="]),
        ("accelerate launch --quiet /a/train/lora.py optim.name=adam", ["adamw", "adamw8bit"]),
        ("python train/full.py full.text_encoder=", ["true", "false"]),
        ("python scripts/export.py format=k", ["kohya"]),
        ("python scripts/init.py method=dream", ["dreambooth"]),
        ("python scripts/plan.py card", ["card="]),
        ("python train/lora.py --q", ["--quiet"]),
        ("python scripts/runs.py re", ["report", "reverse="]),
        ("python scripts/runs.py list so", ["sort="]),
        ("python scripts/adapters.py merge precision=f", ["fp32", "fp16"]),
        ("python scripts/sweep.py lora.ra", ["lora.rank=", "lora.rank_stabilised="]),
        ("python eval/compare.py rating_kind=p", ["pair"]),
        ("python train/dreambooth.py --config configs/dreamb", ["configs/dreambooth.yaml"]),
        ("python elsewhere.py lora.r", []),
    ],
)
def test_bash_offers(script, line, words):
    assert offered(script, line) == words


NOT_OFFERED = {"scripts/completion.py": "takes the name of a shell and no keys"}


def test_every_command_is_offered():
    files = [
        file for folder in ("train", "eval", "scripts") for file in ROOT.glob(f"{folder}/*.py")
    ]
    commands = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if "\n    command(main)\n" in file.read_text()
    }
    assert commands - NOT_OFFERED.keys() == completion.ENTRIES.keys()
    assert completion.TASKS.keys() <= completion.ENTRIES.keys()


def test_the_script_is_bash_and_runs_no_python(script):
    subprocess.run(["bash", "-n", script], check=True)
    functions = script.read_text().partition("\ncomplete ")[0]
    assert "python " not in functions.replace("python python3", "")


def test_zsh_and_fish_have_the_same_keys():
    keys = completion.all_keys()
    for text in (completion.zsh(keys), completion.fish(keys)):
        assert "lora.rank=" in text and "scripts/prepare.py" in text and "adamw8bit" in text


def test_another_shell_is_refused():
    with pytest.raises(UserError, match="bash, zsh, fish"):
        completion.main(["tcsh"])
