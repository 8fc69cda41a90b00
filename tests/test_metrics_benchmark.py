"""scripts/benchmark.py eval: the same code as in earnest on next to nothing."""

import json
import os

import pytest

from scripts import benchmark
from scripts.benchmarks import metrics_benchmark
from scripts.benchmarks.metrics_benchmark import Scale
from train.config import UserError

TINY = Scale(dimension=12, pictures=300, pairs=20, few=8, clip=10, rounds=2)


@pytest.fixture
def tiny(monkeypatch):
    """Without new processes."""

    def here(function: str, **arguments):
        module, _, name = function.partition(":")
        assert module == metrics_benchmark.__name__
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
        return getattr(metrics_benchmark, name)(**arguments) | {"peak_mib": 1.0}

    monkeypatch.setattr(metrics_benchmark, "fresh", here)
    monkeypatch.setattr(metrics_benchmark, "FULL", TINY)


def test_the_report_has_all_its_fields_and_a_table(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    output = tmp_path / "made" / "benchmark.json"
    benchmark.main(["eval", f"output={output}"])
    results = json.loads(output.read_text())["results"]
    assert results.keys() == {"streaming", "frechet", "intervals", "pairs"}
    assert results["streaming"]["pictures"] == 300
    assert len(results["frechet"]["seconds"]) == len(results["pairs"]["seconds"]) == 4
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    assert printed.count("\n| ") == 2 + 2 + 4 + 1 + 5
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"


def test_parts_are_chosen_and_misspelt_ones_refused(tiny, capsys):
    benchmark.main(["eval", "parts=[intervals]"])
    assert "intervals of two FIDs" in capsys.readouterr().out
    with pytest.raises(UserError, match="parts"):
        benchmark.main(["eval", "parts=[everything]"])
