"""The table of docs/reliability.md, from what the test files say of their cases.

python -m tests.faults.document
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

from tests.faults.removals import CASES, files_of, removals_of


def rows() -> Iterator[str]:
    """One for each test file: the case, what is promised, and what was taken out to see it fail."""
    for case in CASES:
        for file in files_of(case):
            module = importlib.import_module(f"tests.faults.{file.stem}")
            said = inspect.cleandoc(module.__doc__ or "").partition("\n\n")[0]
            happens, _, promised = " ".join(said.split()).partition(": ")[2].partition(" -> ")
            without = "; ".join(removal.what for removal in removals_of(file))
            link = f"[{case}](../tests/faults/{file.name})"
            cells = (link, happens, promised.rstrip("."), without)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print("\n".join(rows()))
