"""SD 2.1's real size on a CPU: minutes and gigabytes, so marked slow."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from data import toy
from tests.runs import ROOT, finish, launch

pytestmark = pytest.mark.slow
GIB = 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size") / "sd21"
    finish(launch("scripts/toy/full_size.py", str(folder)))
    yield folder
    shutil.rmtree(folder)


def test_two_steps_of_lora_at_256_pixels_fit_in_20_gib_and_load(base, tmp_path):
    toy.write_pictures(tmp_path / "pictures", 2, seed=0, square=True)
    run = tmp_path / "run"
    finish(
        launch(
            "train/lora.py",
            f"--config={ROOT / 'configs' / 'lora.yaml'}",
            f"output={run}",
            f"model.path={base}",
            f"data.path={tmp_path / 'pictures'}",
            f"data.cache={tmp_path / 'cache'}",
            "data.resolution=256",
            "data.workers=0",
            "train.steps=2",
            "train.batch_size=1",
            "train.micro_batch_size=1",
            "train.mixed_precision=no",
            "optim.warmup_steps=0",
            "preview.every=0",
            "tracking.every=1",
        )
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    peak = max(record.get("peak_memory_gib", 0) for record in records)
    print(f"peak memory {peak:.1f} GiB", file=sys.stderr)
    assert 0 < peak < 20
    adapter = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert len(adapter) == 2 * 128  # 16 transformers x 2 attentions x 4 projections
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    _load_and_check(base, run / "adapter", adapter)


def _load_and_check(base, folder, adapter):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        base, safety_checker=None, dtype=torch.float16
    )
    pipeline.load_lora_weights(str(folder))
    loaded = {n: p for n, p in pipeline.unet.named_parameters() if "lora_" in n}
    assert len(loaded) == len(adapter)
    moved = [p for n, p in loaded.items() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == len(adapter) // 2
