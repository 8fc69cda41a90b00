"""A few examples of what `python -m tests.fuzz` tries by the thousand, always the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.targets import TARGETS

EXAMPLES = {"config": 80, "metadata": 100, "plan": 30, "safetensors": 150}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_it_succeeds_or_says_what_is_wrong(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.examples())
    def attempt(example: Any) -> None:
        target.check(example, tmp_path)

    attempt()
