"""train/lora.py end to end, on a tiny base: what moves, what resumes, what loads elsewhere."""

import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from eval import in_training
from tests import judged
from tests.runs import arguments, finish, launch, make_world, preview_again
from train import examination, lora, models
from train.config import UserError

# Adam divides by the size of the gradient: where that is as small as its rounding, the order of a
# sum would decide the step's sign. A larger epsilon leaves the rest as it is.
COMPARABLE = ("lora.dropout=0", "optim.learning_rate=1e-3", "optim.eps=1e-6")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """One finished, uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "run"
    lora.main(arguments(world, output))
    return output


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_run_directory_holds_what_the_contract_names(run):
    config = (run / "config.yaml").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert "rank: 2" in config
    assert manifest["dataset"]["pictures"] == 9 and manifest["packages"]["torch"]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second"} <= first.keys()
    assert {"data_wait_fraction", "peak_memory_gib"} <= first.keys()
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000006",
    ]
    assert (run / "previews" / "base" / "01.png").is_file()
    assert (run / "previews" / "step-00000006" / "grid.png").is_file()


ALL = "lora.targets=[attention,proj,feed_forward,convolution]"
TEXT = "lora.text_encoder={rank: 3, targets: [attention, feed_forward]}"
# Of each: how many layers of the UNet and of the text encoder have adapters, and of how many
# tensors these are.
KINDS = {
    "plain": ((), 32, 0, 2),
    "blocks": (("lora.blocks={up_blocks.*: 3, mid_block: 0}",), 24, 0, 2),
    "text encoder": ((ALL, TEXT), 69, 12, 2),
    "dora": ((ALL, TEXT, "lora.dora=true"), 69, 12, 3),
    "rank-stabilised, bf16": (
        (TEXT, "lora.rank_stabilised=true", "train.mixed_precision=bf16"),
        32,
        12,
        2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_weight_moves_and_nothing_else(world, tmp_path, monkeypatch, kind):
    overrides, unet, text_encoder, each = KINDS[kind]
    watched = watch(monkeypatch)
    lora.main(arguments(world, tmp_path / "run", "preview.every=0", *overrides))
    ((before, after),) = watched
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert sum(name.startswith("unet") for name in moved) == unet * each
    assert sum(name.startswith("text_encoder") for name in moved) == text_encoder * each
    assert {after[name].dtype for name in moved} == {torch.float32}


def watch(monkeypatch) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """All tensors of the pipeline before and after each training that follows."""
    from train import loop

    found = []
    fit = loop.fit

    def watching(method, *args):
        before = tensors(method.pipeline())
        fit(method, *args)
        found.append((before, tensors(method.pipeline())))

    monkeypatch.setattr(loop, "fit", watching)
    return found


def tensors(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


def test_what_is_resumed_in_bf16_is_in_fp32_and_ends_in_the_same_bits(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = arguments(
        world, run, TEXT, "lora.dora=true", "train.mixed_precision=bf16", "preview.every=0"
    )
    lora.main(command)
    uninterrupted = adapter(run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    watched = watch(monkeypatch)
    lora.main(command)
    assert_same(adapter(run), uninterrupted)
    ((before, after),) = watched
    for state in (before, after):
        assert {t.dtype for n, t in state.items() if ".lora_" in n} == {torch.float32}
        assert {t.dtype for n, t in state.items() if n.endswith("conv1.weight")} == {torch.bfloat16}


@pytest.mark.parametrize("overrides", [(), (ALL, TEXT, "lora.dora=true")], ids=["plain", "all"])
def test_the_adapter_in_an_untouched_pipeline_gives_the_preview_s_pixels(
    world, run, tmp_path, overrides
):
    if overrides:
        run = tmp_path / "run"
        lora.main(arguments(world, run, *overrides, "diffusion.zero_terminal_snr=true"))
    pipeline = StableDiffusionPipeline.from_pretrained(world / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    base = preview_again(pipeline, "a small blue star", seed=1)
    pipeline.load_lora_weights(str(run / "adapter"))
    pipeline.scheduler = DDIMScheduler.from_pretrained(run / "adapter", subfolder="scheduler")
    preview = np.asarray(Image.open(run / "previews" / "step-00000006" / "01.png"))
    assert np.array_equal(preview_again(pipeline, "a small blue star", seed=1), preview)
    assert not np.array_equal(base, preview)
    assert pipeline.scheduler.config.rescale_betas_zero_snr == bool(overrides)


def test_the_same_command_on_a_finished_run_does_nothing(world, run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    lora.main(arguments(world, run))
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_another_configuration_in_the_same_directory_is_refused_by_key(world, run):
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.01 -> 0.02"):
        lora.main(arguments(world, run, "optim.learning_rate=0.02"))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(world, run, tmp_path, workers):
    lora.main(arguments(world, tmp_path / "run", f"data.workers={workers}", "preview.every=0"))
    assert_same(adapter(tmp_path / "run"), adapter(run))


def test_micro_batches_only_cut_the_batch(world, tmp_path):
    for size in (1, 4):
        lora.main(
            arguments(
                world,
                tmp_path / str(size),
                f"train.micro_batch_size={size}",
                *COMPARABLE,
            )
        )
    one, four = adapter(tmp_path / "1"), adapter(tmp_path / "4")
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-5


def test_a_cached_run_encodes_nothing(world, run, tmp_path, monkeypatch):
    calls = []
    for kind, name in ((AutoencoderKL, "encode"), (CLIPTextModel, "forward")):
        original = getattr(kind, name)

        def counting(*args, name=name, original=original, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(kind, name, counting)
    lora.main(arguments(world, tmp_path / "run", "preview.every=0"))
    assert calls == []
    lora.main(arguments(world, tmp_path / "b", "preview.every=0", f"data.cache={tmp_path / 'c'}"))
    assert {"encode", "forward"} == set(calls)


def test_killed_anywhere_and_repeated_ends_in_the_same_bits(world, run, tmp_path):
    output = tmp_path / "run"
    # Before the first checkpoint, just past one, and twice in the second epoch.
    for kill_after in (1, 3, 4, 5):
        process = launch("train/lora.py", *arguments(world, output))
        _wait_for_step(process, output, kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(launch("train/lora.py", *arguments(world, output)))
    assert_same(adapter(output), adapter(run))
    # Other processes have other hash seeds, and still the files are the same to the byte.
    twice = [folder / "adapter" / "pytorch_lora_weights.safetensors" for folder in (output, run)]
    assert twice[0].read_bytes() == twice[1].read_bytes()
    assert losses(output) == losses(run)


def _wait_for_step(process, output: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").exists() and len(losses_so_far(output)) >= step:
            return
        time.sleep(0.005)


def losses_so_far(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


def test_two_processes_train_on_the_same_samples_to_the_same_weights(world, tmp_path):
    lora.main(arguments(world, tmp_path / "one", *COMPARABLE))
    finish(launch("train/lora.py", *arguments(world, tmp_path / "two", *COMPARABLE), processes=2))
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5)
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["processes"] == 2


JUDGED = ("evaluation.every=2", "validation.metric=clip_score")


def test_pictures_judged_in_the_course_of_training_change_nothing_of_it(
    world, run, tmp_path, monkeypatch
):
    monkeypatch.setattr(in_training, "judge", partial(judged.judge, fails=0))
    monkeypatch.setattr(in_training, "prepare", judged.prepare)
    lora.main(arguments(world, tmp_path / "run", *JUDGED))
    assert_same(adapter(tmp_path / "run"), adapter(run))
    assert losses_of_steps(tmp_path / "run") == losses(run)
    found = examination.read(tmp_path / "run/eval/steps")
    assert [one.step for one in found] == [0, 2, 4, 6]
    values = [one.value("clip_score") for one in found]
    for one, picture in zip(found, sorted(tmp_path.rglob("eval/steps/*/00000.png")), strict=True):
        assert np.asarray(Image.open(picture)).mean() == one.value("clip_score")
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert best["value"] == max(values[1:]) == values[best["step"] // 2]


@pytest.mark.slow
def test_two_processes_judge_together_and_fail_together(world, tmp_path):
    args = arguments(world, tmp_path / "two", *COMPARABLE, *JUDGED)
    said = finish(launch("tests/judged.py", "train/lora.py", *args, processes=2))
    assert said.count("warning: step 2 has no scores: MemoryError: full") == 1
    found = {one.step: one for one in examination.read(tmp_path / "two/eval/steps")}
    assert list(found) == [0, 4, 6]
    for step, one in found.items():
        pictures = sorted((tmp_path / f"two/eval/steps/step-{step:08d}").glob("*.png"))
        means = [np.asarray(Image.open(path)).mean() for path in pictures]
        assert len(means) == 2 and one.value("clip_score") == sum(means)
    best = max((4, 6), key=lambda step: found[step].value("clip_score"))
    marked = json.loads((tmp_path / "two/checkpoints/best.json").read_text())
    assert (marked["step"], marked["value"]) == (best, found[best].value("clip_score"))


def losses_of_steps(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_goes_on_from_another_s_adapter(world, run, tmp_path):
    still = ("optim.learning_rate=1e-12", "optim.final_learning_rate=0", "preview.every=0")
    start = f"lora.start_from={run / 'adapter'}"
    lora.main(arguments(world, tmp_path / "run", start, *still))
    first, second = adapter(run), adapter(tmp_path / "run")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=1e-9) for name in first)


@pytest.mark.parametrize(
    "override, message",
    [
        ("lora.blocks={down_blocks.7: 2}", "lora.blocks: 'down_blocks.7' fits no layer"),
        ("lora.rank=3", "lora.start_from.* has rank 2, and lora.rank"),
        ("lora.targets=[proj]", "lora.start_from.* changes layers"),
    ],
)
def test_a_wrong_adapter_is_named_before_weights_are_loaded(
    world, run, tmp_path, monkeypatch, override, message
):
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    start = f"lora.start_from={run / 'adapter'}"
    with pytest.raises(UserError, match=message):
        lora.main(arguments(world, tmp_path / "run", start, override))
    assert not (tmp_path / "run").exists()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
