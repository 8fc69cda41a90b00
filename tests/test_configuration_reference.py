"""docs/configuration.md says what the code says, of every key of every command."""

import re

import pytest

from scripts import reference
from train.config import ROOT, Section, fields

COMMANDS = reference.commands()
SCHEMAS = [*reference.METHODS.items(), *COMMANDS]


def test_the_page_is_that_of_the_code():
    written = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert written == reference.page(), "a key has changed: python scripts/reference.py"


@pytest.mark.parametrize("name, schema", SCHEMAS, ids=[name for name, _ in SCHEMAS])
def test_every_key_says_what_it_means(name, schema):
    unsaid = [key for key, field in fields(schema) if not (field.description or "").strip()]
    assert not unsaid, f"{name}: add a docstring beneath {', '.join(unsaid)}"


def test_every_command_that_reads_keys_is_on_the_page():
    shown = {name.split()[0] for name, _ in COMMANDS}
    for folder in ("eval", "scripts"):
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text("utf-8")
            if '__name__ == "__main__"' in text and re.search(r"\bload\(", text):
                entry = file.relative_to(ROOT).as_posix()
                assert entry in shown, f"{entry}: name it in its configuration's docstring"


def test_what_a_shipped_configuration_sets_stands_below_the_default():
    row = next(line for line in reference.page().splitlines() if line.startswith("| `train.steps`"))
    assert "whole number, at least 1" in row
    assert "`1000`<br>lora: `2000`<br>dreambooth: `800`" in row


def test_a_meaning_stays_in_its_column():
    class Odd(Section):
        """Odd (scripts/odd.py)."""

        key: str = "a|b"
        """One of {a|b}, like <this> or up_blocks.*"""

    ((name, field),) = fields(Odd)
    (*_, row) = reference._table([reference.Key(name, field, ())], {})
    assert row == r"| `key` | text | `a\|b` | One of {a\|b}, like \<this> or up_blocks.\* |"
