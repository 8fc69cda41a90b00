import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.sampling import SCHEDULERS, SchedulerName, size_of
from scripts import generate
from scripts.generate import GenerateConfig
from tests.tiny import tiny_pipeline
from train import adapters, export
from train.config import ROOT, LoraConfig, UserError, load

HOW = ["steps=2", "guidance=3", "width=64", "height=32", "batch_size=2"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = tiny_pipeline()
    adapters.attach(pipeline, LoraConfig(rank=2), seed=0)
    torch.manual_seed(1)
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    export.save_lora(pipeline, folder)
    return folder


@pytest.fixture
def make(base, tmp_path):
    def run(*arguments, output="out"):
        generate.main([f"model={base}", f"output={tmp_path / output}", *HOW, *arguments])
        return [np.asarray(Image.open(p)) for p in sorted((tmp_path / output).glob("*.png"))]

    return run


def plain(base, adapter=None, scale=1.0, **how):
    """The picture of an untouched diffusers pipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    if adapter:
        pipeline.load_lora_weights(str(adapter), adapter_name="a")
        pipeline.set_adapters("a", scale)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 64, "height": 32} | how
    generator = torch.Generator("cpu").manual_seed(7)
    picture = pipeline("a cat", generator=generator, output_type="np", **settings).images[0]
    return np.rint(picture * 255).astype(np.uint8)


def test_the_pictures_are_those_of_a_plain_pipeline(make, base, adapter):
    (bare,) = make("prompt=a cat", "seed=7", output="bare")
    (half,) = make("prompt=a cat", "seed=7", f"adapters={adapter}:0.5", output="half")
    assert bare.shape == (32, 64, 3)
    assert np.array_equal(bare, plain(base))
    assert np.array_equal(half, plain(base, adapter, 0.5))
    assert not np.array_equal(bare, half)


def test_the_negative_prompt_and_the_scheduler_steer(make, base):
    (bare,) = make("prompt=a cat", "seed=7")
    (negative,) = make("prompt=a cat", "seed=7", "negative_prompt=dark: very", output="negative")
    assert np.array_equal(negative, plain(base, negative_prompt="dark: very"))
    (euler,) = make("prompt=a cat", "seed=7", "scheduler=euler", output="euler")
    assert not np.array_equal(bare, negative) and not np.array_equal(bare, euler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_keeps_the_noise_schedule_and_prediction_type(base, tmp_path, name):
    arguments = [f"model.path={base}", f"output={tmp_path}", "prompt=x", f"scheduler={name}"]
    scheduler = generate.load_base(load(GenerateConfig, arguments)).scheduler
    assert type(scheduler).__name__ == SCHEDULERS[name].kind
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, tiny_pipeline().scheduler.alphas_cumprod)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_no_scheduler_clips_latents_that_the_base_s_own_does_not(tmp_path, name):
    tiny_pipeline(family="sd21-base").save_pretrained(tmp_path / "base")
    arguments = [f"model.path={tmp_path / 'base'}", f"output={tmp_path}", "prompt=x"]
    config = load(GenerateConfig, [*arguments, f"scheduler={name}"])
    assert not generate.load_base(config).scheduler.config.clip_sample


def test_pictures_go_round_the_prompts_and_more_only_add(make, tmp_path):
    two = make("prompts=[a cat, a dog]", "count=1", "seed=5")
    four = make("prompts=[a cat, a dog]", "count=2", "seed=5")
    assert len(two) == 2 and len(four) == 4
    assert np.array_equal(four[:2], two)
    (alone,) = make("prompt=a dog", "seed=8", output="alone")
    assert np.abs(four[3].astype(int) - alone).max() <= 1
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    from_file = make(f"prompt_file={tmp_path / 'prompts.txt'}", "seed=5", output="file")
    assert np.array_equal(from_file, two)


def test_the_written_configuration_repeats_the_command(make, tmp_path, adapter):
    first = make("prompt=a: 'cat', [x]", f"adapters=[{adapter}, {adapter}:0.3]")
    file = tmp_path / "out/config.yaml"
    assert yaml.safe_load(file.read_text())["prompt"] == "a: 'cat', [x]"
    generate.main(["--config", str(file), f"output={tmp_path / 'again'}"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again/00000.png")), first[0])


def test_a_folder_of_another_negative_prompt_or_of_a_run_is_refused(make, tmp_path):
    make("prompt=a cat")
    with pytest.raises(UserError, match="another negative_prompt"):
        make("prompt=a cat", "negative_prompt=dark")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="choose another output="):
        make("prompt=a cat", output="run")
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"


@pytest.mark.parametrize(
    "wanted", [[], ["prompt="], ["prompt=a", "prompts=[b]"], ["prompts=[]"], ["prompt_file=gone"]]
)
def test_what_to_show_is_said_once(make, wanted):
    with pytest.raises(UserError, match="prompt_file"):
        make(*wanted)


def test_an_unknown_size_is_asked_for_and_a_known_one_used(base, tmp_path):
    pipeline = tiny_pipeline()
    arguments = [f"model.path={base}", f"output={tmp_path}", "prompt=x"]
    with pytest.raises(UserError, match="width= and height="):
        size_of(pipeline, load(GenerateConfig, arguments))
    pipeline.unet.register_to_config(sample_size=96)
    assert size_of(pipeline, load(GenerateConfig, arguments)) == (768, 768)
    wide = load(GenerateConfig, [*arguments, "width=1024"])
    assert size_of(pipeline, wide) == (1024, 768)


def test_a_wrong_adapter_is_refused_before_anything_is_loaded(make, adapter, tmp_path, monkeypatch):
    state = load_file(adapter / "pytorch_lora_weights.safetensors")
    other = {k: torch.zeros(2, 768) if "attn2.to_k.lora_A" in k else v for k, v in state.items()}
    save_file(other, tmp_path / "sd1.safetensors")
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="adapter of Stable Diffusion 1"):
        make("prompt=a cat", f"adapters={tmp_path / 'sd1.safetensors'}")
    assert not (tmp_path / "out").exists()


def test_a_broken_adapter_is_told_from_a_picture(make, adapter, tmp_path):
    state = load_file(adapter / "pytorch_lora_weights.safetensors")
    save_file({k: v * float("nan") for k, v in state.items()}, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="not finite at precision=no"):
        make("prompt=a cat", f"adapters={tmp_path / 'nan.safetensors'}")


def test_the_command_line(base, tmp_path):
    command = [sys.executable, "scripts/generate.py", f"model={base}", *HOW]
    run = {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([*command, "prompt=a cat", f"output={tmp_path / 'out'}"], **run)
    assert done.returncode == 0, done.stderr
    assert f"pictures: 1 in {tmp_path / 'out'}" in done.stdout
    wrong = subprocess.run([*command, "prompt=a", "output=x", "model=/gone"], **run)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: model.path=/gone")


def test_every_scheduler_samples(base, tmp_path):
    arguments = [f"model.path={base}", f"output={tmp_path}", "prompt=x"]
    pipeline = generate.load_base(load(GenerateConfig, arguments))
    own, pictures = pipeline.scheduler, []
    for name in SCHEDULERS:
        pipeline.scheduler = own
        generate.use_sampler(pipeline, name)
        how = {"num_inference_steps": 4, "width": 32, "height": 32, "output_type": "np"}
        generator = torch.Generator("cpu").manual_seed(0)
        pictures.append(pipeline("a cat", generator=generator, **how).images[0])
        assert np.isfinite(pictures[-1]).all() and pictures[-1].std() > 0.01, name
    assert len({picture.tobytes() for picture in pictures}) == len(SCHEDULERS)
    assert set(get_args(SchedulerName)) == set(SCHEDULERS)


def test_a_scheduler_is_refused_that_cannot_do_what_the_base_was_trained_at(tmp_path):
    pipeline = tiny_pipeline()
    config = pipeline.scheduler.config
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="does not know zero terminal SNR.* one of ddim, "):
        generate.use_sampler(pipeline, "heun")
    generate.use_sampler(pipeline, "euler")
    assert pipeline.scheduler.config.rescale_betas_zero_snr
    pipeline.scheduler = type(pipeline.scheduler).from_config(config, prediction_type="sample")
    with pytest.raises(UserError, match="cannot step a model that predicts the picture itself"):
        generate.use_sampler(pipeline, "euler_a")
