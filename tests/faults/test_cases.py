"""Every case of docs/reliability.md has one test file, which says what it is held by."""

from __future__ import annotations

import importlib

import pytest

from tests.faults.removals import CASES, ROOT, files_of, misfits, removals_of


@pytest.mark.parametrize("case", CASES)
def test_a_case_has_one_file_that_names_what_holds_it(case: int) -> None:
    (file,) = files_of(case)
    said = importlib.import_module(f"tests.faults.{file.stem}").__doc__ or ""
    assert said.startswith(f"Case {case}: ") and "->" in said
    removals = removals_of(file)
    assert removals
    assert [why for removal in removals if (why := misfits(removal))] == []


@pytest.mark.parametrize("case", CASES)
def test_the_document_names_the_case_and_its_file(case: int) -> None:
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    for file in files_of(case):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {case} |")]
        assert file.name in line
