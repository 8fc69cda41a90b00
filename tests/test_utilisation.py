"""How much of a GPU's arithmetic a run is said to use."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.runs import arguments, make_world
from train import flops, lora, utilisation
from train.architecture import Architecture
from train.config import LoraRun, load


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def batch(count, height, width, tokens=77):
    return {
        "latents": torch.empty(count, 4, height, width),
        "prompt_embeds": torch.empty(count, tokens, 32),
    }


@pytest.mark.parametrize(("height", "width", "windows"), [(64, 64, 1), (40, 96, 1), (96, 88, 3)])
def test_the_work_of_any_bucket_is_what_is_counted_there(world, tmp_path, height, width, windows):
    config = load(LoraRun, arguments(world, tmp_path / "run"))
    base = Architecture.of(config.model)
    work = flops.count(base, (8 * width, 8 * height), windows=windows)
    seconds = utilisation.at_peak(config, peak=1e9)
    found = seconds([batch(3, height, width, 77 * windows), batch(1, height, width, 77 * windows)])
    assert found == pytest.approx(4 * flops.per_picture(config, work).model / 1e9, rel=1e-3)


def test_nothing_is_said_where_the_device_is_not_known(world, tmp_path, monkeypatch):
    config = load(LoraRun, arguments(world, tmp_path / "run"))
    on = {name: SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda")}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Card")
    assert utilisation.work_of(config, on["cpu"]) is utilisation.unknown
    assert utilisation.work_of(config, on["cuda"]) is utilisation.unknown
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert utilisation.work_of(config, on["cuda"])([batch(1, 8, 8)]) > 0


def test_the_share_of_the_peak_is_in_each_line_of_metrics(world, tmp_path, monkeypatch):
    at = utilisation.at_peak
    monkeypatch.setattr("train.feeding.work_of", lambda config, _: at(config, peak=1e12))
    lora.main(arguments(world, tmp_path / "run", "preview.every=0", "validation.every=0"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert all(0 < line["mfu"] < 1 for line in lines if "loss" in line)
