import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tiny import tiny_pipeline
from tests.tiny_adapters import trained
from train import export
from train.config import LoraConfig, TextLoraConfig, UserError
from train.previews import at_rest

ALL = ["attention", "proj", "feed_forward", "convolution"]
TEXT = TextLoraConfig(rank=3, alpha=5.0, targets=["attention", "feed_forward"])


def picture(pipeline) -> np.ndarray:
    return pipeline(
        "a red cat",
        num_inference_steps=3,
        width=64,
        height=64,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4, alpha=10.0, targets=ALL),
        LoraConfig(rank=4, alpha=6.0, blocks={"*": 2, "mid_block": 0, "up_blocks.1": 3}),
        LoraConfig(rank=4, text_encoder=TEXT),
        LoraConfig(rank=4, targets=ALL, dora=True, text_encoder=TEXT),
        LoraConfig(rank=4, targets=ALL, rank_stabilised=True, blocks={"up_blocks": 2}),
    ],
    ids=["plain", "blocks", "text encoder", "dora", "rank-stabilised"],
)
def test_an_untouched_pipeline_makes_the_same_pixels_with_the_adapter(tmp_path, config):
    pipeline = trained(config)
    export.save_lora(pipeline, tmp_path)
    other = tiny_pipeline()
    before = picture(other)
    other.load_lora_weights(str(tmp_path))
    with at_rest(pipeline.unet), at_rest(pipeline.text_encoder):
        expected = picture(pipeline)
    assert np.array_equal(picture(other), expected)
    assert not np.array_equal(before, expected)
    for part in ("unet", "text_encoder"):
        assert ranks(getattr(other, part)) == ranks(getattr(pipeline, part))


def ranks(model) -> dict[str, int]:
    """By layer, of its one adapter."""
    return {n: min(m.r.values()) for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_a_preview_leaves_training_as_it_was():
    unet = trained(LoraConfig(dropout=0.5)).unet
    unet.train()
    unet.conv_in.eval()
    states = [[m.training for m in unet.modules()], [p.requires_grad for p in unet.parameters()]]
    with pytest.raises(KeyboardInterrupt), at_rest(unet):
        assert not any(m.training for m in unet.modules())
        raise KeyboardInterrupt
    assert states[0] == [m.training for m in unet.modules()]
    assert states[1] == [p.requires_grad for p in unet.parameters()]


def test_the_file_is_fp32_with_rank_and_alpha_in_its_metadata(tmp_path):
    pipeline = trained(LoraConfig(rank=2, alpha=6.0, text_encoder=TEXT))
    export.save_lora(pipeline, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {torch.float32}
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (2, 6.0)
    assert (settings["text_encoder.r"], settings["text_encoder.lora_alpha"]) == (3, 5.0)
    assert not [value for value in settings.values() if "/" in str(value)]  # no one's folders


def test_the_scheduler_beside_an_adapter_says_how_it_was_trained(tmp_path):
    from diffusers import DDIMScheduler

    from train.config import DiffusionConfig
    from train.models import reschedule

    pipeline = tiny_pipeline()
    pipeline.scheduler = reschedule(pipeline.scheduler, DiffusionConfig(zero_terminal_snr=True))
    export.save_scheduler(pipeline, tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")] == [
        "scheduler/scheduler_config.json"
    ]
    config = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler").config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"


def test_an_adapter_that_is_not_finite_is_never_written(tmp_path):
    pipeline = trained(LoraConfig())
    next(p for p in pipeline.unet.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite.*learning_rate"):
        export.save_lora(pipeline, tmp_path / "adapter")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_whole_pipeline_comes_back_bit_identical(tmp_path):
    from train.models import load_pipeline

    pipeline = tiny_pipeline()
    export.save_pipeline(pipeline, tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    assert np.array_equal(picture(load_pipeline(str(tmp_path))), picture(pipeline))


class Writes:
    """A method whose export writes one file, or fails half-way."""

    def __init__(self, text: str, fail: bool = False) -> None:
        self.text, self.fail = text, fail

    def export(self, directory) -> None:
        (directory / "sub").mkdir()
        (directory / "sub/file").write_text(self.text)
        if self.fail:
            raise RuntimeError("disk full")


def test_publishing_replaces_the_folder_at_once_or_leaves_it(tmp_path):
    main = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    result = tmp_path / "adapter"
    export.publish(Writes("old"), result, main)
    (result / "stray").write_text("from before")
    with pytest.raises(RuntimeError):
        export.publish(Writes("torn", fail=True), result, main)
    assert (result / "sub/file").read_text() == "old"
    export.publish(Writes("new"), result, main)
    assert (result / "sub/file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (result / "stray").exists()


def test_only_the_main_process_publishes(tmp_path):
    other = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    export.publish(Writes("x"), tmp_path / "adapter", other)
    assert not list(tmp_path.iterdir())


def test_the_order_of_the_metadata_is_the_same_in_every_process(tmp_path):
    method = trained(LoraConfig(rank=2))
    export.save_lora(method, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    names = list(json.loads(content[8:end])["__metadata__"])
    assert names == sorted(names) and len(names) > 1 and end % 8 == 0
    tensors = load_file(file)
    export._sort_metadata(file)
    assert file.read_bytes() == content and tensors
