"""scripts/benchmarks: how fast pictures are cached and made, with the code of earnest runs on next
to nothing."""

import pytest

from scripts.benchmarks import caching_benchmark, data_benchmark, generate_benchmark
from scripts.benchmarks.generate_benchmark import Scale


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Without new processes, and on as many threads as other tests."""
    import torch

    from data import cache

    monkeypatch.setattr(cache, "DECODERS", cache.DECODERS)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(caching_benchmark, "SIDE", 64)
    monkeypatch.setattr(data_benchmark, "PHOTO", (400, 300))
    for module in (data_benchmark, generate_benchmark):
        monkeypatch.setattr(module, "fresh", here(module))


def here(module):
    def run(function: str, **arguments):
        name, _, function = function.partition(":")
        assert name == module.__name__
        return getattr(module, function)(**arguments)

    return run


def sound(*spreads):
    return all(0 < one["min"] <= one["median"] <= one["max"] for one in spreads)


def test_caching_is_measured_alone_and_together(tmp_path):
    scale = data_benchmark.QUICK._replace(photos=2, rounds=2)
    results = data_benchmark.measure(["caching"], scale, scratch=tmp_path)
    found = results["caching"]
    assert found["pictures"] == 2 * caching_benchmark.AT_ONCE
    assert found["per_second"].keys() == {"decode", "encode", "both", "encode_bf16"}
    assert sound(*found["per_second"].values(), found["share_of_slower"], found["bf16_ratio"])
    assert data_benchmark.table(results).count("\n") == 1 + 6
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_making_pictures_is_split_into_its_parts(base):
    scale = Scale(steps=2, batches=(1, 2), rounds=2)
    results = generate_benchmark.measure(
        ["pictures", "batches"], scale, model=str(base), precision="bf16", side=32
    )
    one, several = results["pictures"], results["batches"]
    assert one["size"] == [32, 32] and one["steps"] == 2
    assert sound(*one["seconds"].values(), one["unet_share"], one["decode_share"])
    assert one["unet_share"]["median"] + one["decode_share"]["median"] < 1.5
    assert several["sizes"] == [1, 2] and several["unet_gain"][0]["median"] == 1
    assert sound(*several["unet_per_second"], *several["decode_per_second"])
    assert generate_benchmark.table(results).count("\n") == 1 + 4 + 4


def test_only_what_is_asked_for_is_measured(base):
    scale = Scale(steps=1, batches=(1,), rounds=1)
    assert generate_benchmark.measure(["batches"], scale, model=str(base), side=32).keys() == {
        "batches"
    }
