"""scripts/benchmark.py checkpoint: the same code as in earnest on next to nothing."""

import json

import pytest

from scripts import benchmark
from scripts.benchmarks import checkpoint_benchmark
from scripts.benchmarks.checkpoint_benchmark import Scale
from train.config import UserError


@pytest.fixture
def tiny(monkeypatch):
    """Without new processes."""

    def here(function: str, **arguments):
        module, _, name = function.partition(":")
        assert module == checkpoint_benchmark.__name__
        return getattr(checkpoint_benchmark, name)(**arguments)

    monkeypatch.setattr(checkpoint_benchmark, "fresh", here)
    monkeypatch.setattr(checkpoint_benchmark, "SIDE", 32)
    monkeypatch.setattr(checkpoint_benchmark, "FULL", Scale(3, 2, 2, 1))


def test_the_report_has_all_its_fields_and_a_table(tiny, tmp_path, capsys):
    output = tmp_path / "made" / "benchmark.json"
    benchmark.main(["checkpoint", f"output={output}", f"scratch={tmp_path}"])
    results = json.loads(output.read_text())["results"]
    assert results.keys() == {"writing", "training"}
    spreads = [
        *(results["writing"][name] for name in ("mib_per_second", "ratio", "standstill_seconds")),
        *results["training"]["seconds"].values(),
        results["training"]["every_to_last"],
    ]
    assert all(0 < one["min"] <= one["median"] <= one["max"] for one in spreads)
    assert results["training"]["mib"] > 1
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    assert printed.count("\n| ") == 2 + 4 + 3
    assert {path.name for path in tmp_path.iterdir()} == {"made"}  # nothing is left behind


def test_the_plain_way_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_benchmark, "SIDE", 32)
    model, optimizer = checkpoint_benchmark._large(3)
    checkpoint_benchmark._write_plainly(tmp_path / "plain", model, optimizer)
    assert (tmp_path / "plain").stat().st_size == 3 * 3 * 32 * 32 * 4


def test_parts_are_chosen_and_misspelt_ones_refused(tiny, capsys):
    benchmark.main(["checkpoint", "parts=[writing]"])
    printed = capsys.readouterr().out
    assert "share of that rate" in printed and "toy LoRA" not in printed
    with pytest.raises(UserError, match="parts"):
        benchmark.main(["checkpoint", "parts=[everything]"])
