"""What the tests of faults share: a starter of real processes, and a world to train in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.processes import Starter
from tests.runs import make_world


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """Starts real runs; nothing is left of them in the end."""
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(autouse=True)
def _no_leftovers(starter: Starter) -> Iterator[None]:
    """A test's runs end with it."""
    yield
    starter.kill_all()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and pictures, see tests.runs.make_world. The cache beside them is shared."""
    return make_world(tmp_path_factory.mktemp("world"))
