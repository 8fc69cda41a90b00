"""scripts/plan.py: what it prints and writes, and what it refuses."""

import json
import sys

import pytest

from data import toy
from scripts import plan, planning
from scripts.benchmarks import plan_benchmark
from train.architecture import Architecture
from train.config import FullRun, LoraRun, ModelConfig, RunFailed, UserError, load
from train.footprint import Footprint


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


@pytest.mark.slow
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
    assert found["assumed_tflop_per_second"] == 100 and "caching_hours" not in found


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
        (["data.path=hf:nobody/pictures"], "data.path=hf:nobody/pictures: .* images=N"),
        (["data.streaming=true"], "data.streaming=true: .* images=N"),
        (["images=9", "dreambooth.prior=none", "lora=null", "train.quantize=nf4"], "quantize=none"),
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


def planned(base, *overrides, schema=LoraRun, **own):
    run = load(schema, ["output=x", "data.path=y", f"model.path={base}", *overrides])
    return run, Architecture.of(run.model), planning.PlanConfig(**own)


def test_repeats_make_a_batch_larger_than_there_are_pictures(base, tmp_path):
    toy.write_pictures(tmp_path / "few", 4, seed=0, square=True)
    source = f"data.sources=[{{path: {tmp_path / 'few'}, repeats: 20}}]"
    more = ("data.path=null", source, "data.resolution=64", f"data.cache={tmp_path / 'cache'}")
    run, shape, _ = planned(base, *more, "train.batch_size=32")
    assert planning._data(run, shape, None).most == 80
    assert planning._capped(run, 80, 1) is run
    assert planning._capped(run, 4, 1).train.micro_batch_size == 4


def test_sources_with_a_resolution_of_their_own(base):
    sources = "data.sources=[{path: a, resolution: 128}, {path: b}]"
    run, shape, _ = planned(base, "data.path=null", sources, "data.resolution=64")
    assert planning._data(run, shape, 3).size == (128, 128)


def test_crops_and_captions_that_are_drawn_change_the_cache(base):
    plain, cropped, drawn = (
        planning._data(*planned(base, *more)[:2], 100).cache_bytes
        for more in ([], ["data.crop=random"], ["data.captions.shuffle_tags=true"])
    )
    assert cropped > 2 * plain > 2 * drawn


def test_caching_has_its_own_precision(base):
    bf16 = ("train.mixed_precision=bf16",)
    run, _, config = planned(base, *bf16, gpu="NVIDIA H200")
    rate = planning._rate(config, run)
    assert planning._caching_rate(config, run, rate) == pytest.approx(66.9e12 * 0.35)
    half, *_ = planned(base, *bf16, "data.cache_precision=bf16")
    assert planning._caching_rate(config, half, rate) == pytest.approx(rate)
    assert planning._caching_rate(planned(base, achieved=100)[2], run, 1e14) is None


def test_the_disk_has_the_best_checkpoint_and_a_whole_result(base):
    usual, best = (
        planning._disk(run, planning.Data(1, (64, 64), 0), Footprint([], 2**28), shape)
        for run, shape, _ in (
            planned(base, "checkpoint.keep=2", schema=FullRun),
            planned(base, "checkpoint.keep=2", "validation.path=z", schema=FullRun),
        )
    )
    assert (usual["checkpoints"], best["checkpoints"]) == (9, 12)
    assert usual["result"] == round(
        4 * Architecture.of(ModelConfig(path=str(base))).numbers() / 2**30, 3
    )


def test_a_configuration_whose_name_has_a_space(tmp_path):
    (tmp_path / "a b").mkdir()
    file = tmp_path / "a b" / "lora.yaml"
    file.write_text("full: {}\n")
    assert planning._method(["--config", str(file)]) == "full"
    assert planning._method([f"--config={file}", "lora.rank=2"]) == "full"
