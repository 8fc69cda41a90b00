"""The predicted memory of a run: what can be worked out by hand, and what grows when."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from tests.tiny import tiny_pipeline
from train.architecture import Architecture
from train.config import DreamBoothRun, FullRun, LoraRun, ModelConfig, TextualInversionRun, load
from train.footprint import CONTEXT, LIBRARIES, predict
from train.live_memory import Live, counting

NEW_WORD = "textual_inversion.tokens=[{token: a, initial: b, vectors: 2}]"


def phases(base, *overrides, schema=LoraRun, device="cuda", processes=1):
    config = load(schema, ["output=x", "data.path=y", f"model.path={base}", *overrides])
    found = predict(
        config, Architecture.of(config.model), size=(64, 64), device=device, processes=processes
    )
    by_name = {phase.name: phase.bytes for phase in found.phases}
    return SimpleNamespace(**by_name, trained=found.trained, peak=found.peak)


@pytest.fixture(scope="module")
def sizes(base):
    """Of the parts, in numbers."""
    pipeline = tiny_pipeline()
    parts = ("unet", "vae", "text_encoder")
    return {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts}


@pytest.fixture(scope="module")
def full(base):
    return phases(base, schema=FullRun)


@pytest.mark.parametrize("again", [False, True])
def test_fake_tensors_are_counted_as_real_ones_are(again):
    config = tiny_pipeline().unet.config

    def peak(context):
        with context as live:
            unet = UNet2DConditionModel.from_config(config).train()
            if again:
                unet.enable_gradient_checkpointing()
            x, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, config.cross_attention_dim)
            live.mark()
            before = live.bytes
            unet(x, torch.zeros(2), encoder_hidden_states=text).sample.square().mean().backward()
            return live.peak - before

    assert peak(counting("cpu")) == pytest.approx(peak(Live()), rel=1e-3)


def test_nothing_is_computed_and_no_memory_is_taken():
    with counting("cpu") as live:
        large = torch.zeros(1 << 20, 1 << 20) + 1
        assert live.bytes == 4 << 40
        del large
    assert live.bytes == 0
    assert live.peak == 8 << 40


def test_full_training_holds_weights_moments_and_gradients(full, sizes):
    everything = 4 * sum(sizes.values())
    assert full.trained == sizes["unet"]
    away = 4 * (sizes["vae"] + sizes["text_encoder"])  # off the GPU while training
    weights = everything - away
    assert full.checkpoint - CONTEXT == pytest.approx(weights + 8 * sizes["unet"], rel=0.01)
    assert full.training > CONTEXT + weights + 12 * sizes["unet"]


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("adamw8bit", 2),
        pytest.param("adafactor", 2, marks=pytest.mark.slow),  # of 3 x 3, it keeps 6 in place of 9
        pytest.param("prodigy", 16, marks=pytest.mark.slow),
        pytest.param("schedule_free", 8, marks=pytest.mark.slow),
    ],
)
def test_optimizers_differ_in_what_they_keep(base, full, sizes, name, each):
    extra = ["optim.learning_rate=1"] if name == "prodigy" else []
    schedule = ["optim.schedule=constant"] if name == "schedule_free" else []
    found = phases(base, f"optim.name={name}", *extra, *schedule, schema=FullRun)
    expected = (each - 8) * sizes["unet"]
    assert found.checkpoint - full.checkpoint == pytest.approx(expected, abs=0.6 * sizes["unet"])


def test_an_average_is_one_more_copy_and_ddp_another(base, full, sizes):
    averaged = phases(base, "train.ema_decay=0.99", schema=FullRun)
    assert averaged.checkpoint - full.checkpoint == 4 * sizes["unet"]
    several = phases(base, "train.batch_size=16", schema=FullRun, processes=2)
    assert several.training - full.training == pytest.approx(4 * sizes["unet"], rel=0.05)


def test_a_frozen_base_is_kept_in_the_precision_of_the_forward_pass(base, sizes):
    wide, narrow = phases(base), phases(base, "train.mixed_precision=bf16")
    assert wide.storing - narrow.storing == 2 * sizes["unet"]
    packed = phases(base, "train.mixed_precision=bf16", "train.quantize=int8")
    assert packed.storing < narrow.storing


def test_what_makes_a_step_smaller(base):
    usual = phases(base, "train.batch_size=8")
    for setting in ("train.micro_batch_size=2", "train.gradient_checkpointing=true"):
        assert phases(base, "train.batch_size=8", setting).training < usual.training
    some = phases(base, "train.batch_size=8", "train.gradient_checkpointing=[up_blocks.*]")
    assert some.training < usual.training


def test_norms_take_more_on_a_gpu_under_autocast():
    peaks = {}
    for device in ("cpu", "cuda"):
        with counting(device) as live, torch.autocast("cpu", torch.bfloat16):
            norm = torch.nn.LayerNorm(64).bfloat16()
            live.mark()
            assert norm(torch.zeros(1024, 64, dtype=torch.bfloat16)).dtype == (
                torch.float32 if device == "cuda" else torch.bfloat16
            )
            peaks[device] = live.peak
    assert peaks["cuda"] > peaks["cpu"]


def test_on_a_cpu_the_libraries_and_the_copy_of_a_checkpoint_count(base, full, sizes):
    waited = phases(base, "checkpoint.asynchronous=false", schema=FullRun, device="cpu")
    beside = phases(base, schema=FullRun, device="cpu")
    assert waited.loading > LIBRARIES + 4 * sizes["unet"]
    copied = beside.checkpoint - waited.checkpoint
    assert copied == pytest.approx(12 * sizes["unet"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "overrides"),
    [
        (LoraRun, ["lora.text_encoder={}", "lora.dora=true", "lora.targets=[convolution]"]),
        (TextualInversionRun, [NEW_WORD]),
        (TextualInversionRun, [NEW_WORD, "lora.rank=2"]),
        (DreamBoothRun, ["dreambooth.class_prompt=a dog", "train.batch_size=4"]),
    ],
)
def test_every_method_can_be_rehearsed(base, schema, overrides):
    found = phases(base, *overrides, "train.mixed_precision=bf16", schema=schema)
    assert found.training > found.storing > CONTEXT and found.trained > 0


def test_captions_that_are_not_cached_keep_the_text_encoder_on_the_gpu(base, sizes):
    cached, drawn = phases(base), phases(base, "data.captions.shuffle_tags=true")
    assert drawn.storing - cached.storing == pytest.approx(4 * sizes["text_encoder"], rel=0.01)
    assert drawn.training > cached.training and drawn.trained == cached.trained


def test_previews_bring_all_parts_back(base):
    found = phases(base, "preview.prompts=[a dog]", "train.mixed_precision=bf16")
    assert found.preview > found.checkpoint


def test_a_base_that_is_not_here_is_taken_for_sd_2_1(base, sizes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assumed = Architecture.of(ModelConfig(path="nobody/has-this"))
    assert "assumed" in assumed.described
    assert "assumed" in Architecture.of(ModelConfig(path="../nosuch")).described
    own = Architecture.of(ModelConfig(path=str(base)))
    assert own.widths == dict.fromkeys(own.parts, 4)
    assert own.prediction_type == "v_prediction"
    assert own.numbers() == sum(sizes.values())


def test_a_single_file_tells_its_inputs(tmp_path):
    file = tmp_path / "model.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({name: torch.zeros(320, 9, 3, 3)}, file)
    found = Architecture.of(ModelConfig(path=str(file)))
    assert found.channels == 9 and f"assumed for the single file {file}" in found.described
