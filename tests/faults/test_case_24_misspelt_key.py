"""Case 24: a misspelt key -> the run is refused at once, naming the nearest key."""

import pytest

from tests.faults.light import complaint
from tests.faults.removals import Removal

WITHOUT = [
    Removal(
        "keys that nobody knows are refused", "train/parsing.py", 'extra="forbid"', 'extra="ignore"'
    ),
    Removal(
        "the nearest key is looked for",
        "train/parsing.py",
        "{_nearest(schema, _numberless(key))}",
        "",
    ),
]


@pytest.mark.parametrize(
    ("entry", "mistake", "unknown", "meant"),
    [
        ("train/lora.py", "lora.rnak=8", "lora.rnak", "lora.rank"),
        ("train/full.py", "train.step=10", "train.step", "train.steps"),
        ("train/dreambooth.py", "lora.rank_stabilized=true", "lora.rank_stabilized", "lora.rank_s"),
        ("train/textual_inversion.py", "optm.learning_rate=1", "optm", "optim"),
    ],
)
def test_a_misspelt_key_is_told_with_the_one_that_was_meant(
    tmp_path, entry, mistake, unknown, meant
):
    said = complaint(entry, f"output={tmp_path / 'run'}", mistake)
    assert f"unknown key '{unknown}'; did you mean '{meant}" in said
    assert not list(tmp_path.iterdir())


def test_one_in_a_file_is_told_too(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("output: run\ndata:\n  path: pictures\n  resoluton: 512\n")
    said = complaint("train/lora.py", f"--config={file}")
    assert "my.yaml" in said and "did you mean 'data.resolution'?" in said
