"""scripts/plan.py: what it prints and writes, and what it refuses."""

import json
import sys

import pytest

from data import toy
from scripts import plan
from scripts.benchmarks import plan_benchmark
from train.config import RunFailed, UserError


@pytest.fixture
def arguments(base, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{path: {base}}}\nlora: {{rank: 2}}\n"
        f"data: {{path: {tmp_path / 'none'}, resolution: 64, bucket_step: 16, cache: "
        f"{tmp_path / 'cache'}}}\n"
    )
    return [f"--config={file}"]


def made(arguments, tmp_path, *more):
    plan.main([*arguments, f"output={tmp_path / 'made' / 'plan.json'}", *more])
    return json.loads((tmp_path / "made" / "plan.json").read_text())


def test_a_plan_without_pictures(arguments, tmp_path, capsys):
    gpu = ["gpu=NVIDIA H200", "card=24", "processes=2", "link=10"]
    found = made(arguments, tmp_path, "images=100", *gpu, "train.batch_size=4")
    printed = capsys.readouterr().out
    assert found["fits"] and "fits into 24 GiB" in printed
    assert found["peak_gib"] == max(found["memory_gib"].values())
    assert found["assumed_tflop_per_second"] == round(66.9 * 0.35, 1)
    assert found["exchanged_bytes_per_step"] == 4 * found["trained_numbers"]
    step, exchange = found["step_seconds"], found["exchange_seconds"]
    assert 0 < found["scaling_efficiency"] < 1 and step >= 0 and exchange >= 0
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_what_would_make_it_fit_comes_with_its_peak(arguments, tmp_path):
    found = made(arguments, tmp_path, "images=9", "card=0.605", "train.batch_size=64")
    peaks = [found["peak_gib"], *(remedy["peak_gib"] for remedy in found["remedies"])]
    assert not found["fits"] and peaks == sorted(peaks, reverse=True)
    assert [remedy["fits"] for remedy in found["remedies"][:-1]].count(True) == 0
    assert found["remedies"][0]["set"] == "data.cache_batch_size=1"


def test_pictures_that_are_there_are_looked_at(arguments, tmp_path):
    toy.write_pictures(tmp_path / "pictures", 5, seed=0, square=True)
    found = made(arguments, tmp_path, f"data.path={tmp_path / 'pictures'}", "achieved=100")
    assert (found["images"], found["largest_bucket"]) == (5, [64, 64])
    assert found["assumed_tflop_per_second"] == 100


@pytest.mark.slow
def test_the_method_is_that_of_the_configuration(arguments, tmp_path):
    lora = made(arguments, tmp_path, "images=9")["trained_numbers"]
    word = "textual_inversion.tokens=[{token: a, initial: b}]"
    assert made(arguments, tmp_path, "images=9", word)["trained_numbers"] > lora
    whole = made([arguments[0], "lora=null"], tmp_path, "images=9", "dreambooth.prior=none")
    assert whole["trained_numbers"] > 100 * lora


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["gpu=Abacus", "images=9"], "achieved="),
        ([], "images=N"),
        (["output=.", "images=9"], "is a folder"),
        (["images=none"], "images"),
        (["images=9", "train.stps=4"], "did you mean"),
    ],
)
def test_mistakes_are_named(arguments, more, message):
    with pytest.raises(UserError, match=message):
        plan.main([*arguments, *more])


def test_a_configuration_that_tells_no_method(tmp_path):
    (tmp_path / "run.yaml").write_text("output: x\n")
    with pytest.raises(UserError, match="method="):
        plan.main([f"--config={tmp_path / 'run.yaml'}", "images=9"])


# Its benchmark


def test_the_high_water_mark_is_the_commands_own():
    code = "import time; held = bytearray(300 << 20); held[::4096] = bytes(len(held[::4096])); "
    peak = plan_benchmark.resident_peak([sys.executable, "-c", code + "time.sleep(0.3)"])
    assert 300 << 20 < peak < 400 << 20
    with pytest.raises(RunFailed, match="no such thing"):
        plan_benchmark.resident_peak([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_table_names_the_largest_error():
    result = {"predicted_mib": 90, "measured_mib": 100, "error": -0.1, "phase": "training"}
    table = plan_benchmark.table({"a run": result})
    assert "-10.0%" in table and "10.0%" in table.splitlines()[-1]


def test_a_batch_has_no_more_pictures_than_there_are(arguments, tmp_path):
    toy.write_pictures(tmp_path / "few", 3, seed=0, square=True)
    given = (f"data.path={tmp_path / 'few'}", "device=cpu")
    few, many = (
        made(arguments, tmp_path, *given, f"train.batch_size={size}")["peak_gib"]
        for size in (3, 64)
    )
    assert few == many
