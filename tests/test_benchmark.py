"""scripts/benchmark.py: everything is measured, and said with what it was measured on."""

import json
from pathlib import Path

import pytest

from scripts import benchmark
from scripts.benchmarks import data_benchmark, measuring
from scripts.benchmarks.data_benchmark import Scale
from train.config import RunFailed, UserError

PARTS = ["decode", "planning", "reading", "memory", "edit"]  # caching: test_speed_benchmarks.py
TINY = Scale(photos=4, rounds=2, rows=300, entries=12, builds=(3, 5), edited=9)


@pytest.fixture
def tiny(monkeypatch):
    """The same code on next to nothing, without new processes."""

    def here(function: str, **arguments):
        module, _, name = function.partition(":")
        assert module == data_benchmark.__name__
        result = getattr(data_benchmark, name)(**arguments)
        return result | {"peak_mib": 1.0, "peak_anonymous_mib": 0.5}

    monkeypatch.setattr(data_benchmark, "fresh", here)
    monkeypatch.setattr(data_benchmark, "PHOTO", (1200, 900))
    monkeypatch.setattr(data_benchmark, "FULL", TINY)


def test_the_report_has_all_its_fields_and_a_table(tiny, tmp_path, capsys):
    output = tmp_path / "made" / "benchmark.json"
    benchmark.main(["data", f"output={output}", f"scratch={tmp_path}", f"parts={PARTS}"])
    report = json.loads(output.read_text())
    assert {"command", "date", "hardware", "versions", "revision", "quick"} < report.keys()
    assert report["hardware"]["cores"] > 0 and report["versions"]["torch"]
    results = report["results"]
    assert results.keys() == {"decode", "planning", "reading", "memory", "edit"}
    for spread in (
        results["decode"]["ratio"],
        results["planning"]["seconds"],
        results["reading"]["gets_per_second"],
        results["reading"]["samples_per_second"],
    ):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert results["planning"]["batches"] >= 300 / 8
    assert [run["encoded"] for run in results["memory"]["runs"]] == [3, 5]
    assert results["edit"]["first"]["encoded"] == 9 and results["edit"]["second"]["encoded"] == 1
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    assert printed.count("\n| ") == 2 + 3 + 2 + 2 + 2 + 1
    assert {path.name for path in tmp_path.iterdir()} == {"made"}  # nothing is left behind


def test_both_routes_make_the_same_pixels(monkeypatch):
    monkeypatch.setattr(data_benchmark, "PHOTO", (1200, 900))
    photo = data_benchmark._photo(0, rotated=False)
    ours = data_benchmark._our_route(photo, size=(160, 112))
    plain = data_benchmark._plain_route(photo, size=(160, 112))
    assert ours.shape == plain.shape == (112, 160, 3)
    assert abs(ours.astype(int) - plain).mean() < 2
    turned = data_benchmark._photo(1, rotated=True)
    assert data_benchmark._our_route(turned, size=(160, 112)).shape == (112, 160, 3)
    assert data_benchmark._plain_route(turned, size=(160, 112)).shape == (160, 112, 3)


def test_a_fresh_process_gives_its_result_and_its_memory(tmp_path):
    path = tmp_path / "table.arrow"
    result = measuring.fresh(f"{data_benchmark.__name__}:write_table", path=str(path), rows=10)
    assert path.exists() and result["peak_mib"] > result["peak_anonymous_mib"] > 1
    with pytest.raises(RunFailed, match="No such file"):
        measuring.fresh(f"{data_benchmark.__name__}:plan", path=str(tmp_path / "none"))


def test_mistakes_are_answered_at_once(tmp_path: Path):
    with pytest.raises(UserError, match="say what to measure"):
        benchmark.main(["dta"])
    with pytest.raises(UserError, match="parts"):
        benchmark.main(["data", "parts=[everything]"])
