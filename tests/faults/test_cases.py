"""Every case of docs/reliability.md has one test file, which says what it is held by."""

from __future__ import annotations

import importlib

import pytest

from tests.faults.document import rows
from tests.faults.removals import CASES, ROOT, files_of, misfits, removals_of


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_one_file_that_names_what_holds_it(case: int) -> None:
    (file,) = files_of(case)
    said = importlib.import_module(f"tests.faults.{file.stem}").__doc__ or ""
    assert said.startswith(f"Case {case}: ") and "->" in said
    removals = removals_of(file)
    assert removals
    assert [why for removal in removals if (why := misfits(removal))] == []


def test_the_document_has_what_the_tests_say() -> None:
    """`python -m tests.faults.document` prints the rows as they are now."""
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows() if row not in text] == []
