"""What leaves a GPU while nothing needs it. There is none here: the parts only remember where they
were sent, but for one test where `meta`, from which nothing can come back, will do."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from eval import generation
from tests.tiny import tiny_pipeline
from train import made_pictures, resting
from train.config import DiffusionConfig, EvaluationConfig, PreviewConfig
from train.denoiser import Denoiser
from train.diffusion import Objective
from train.examination import Examination
from train.previews import Previews

CPU, GPU = torch.device("cpu"), torch.device("mps:0")


class Part:
    """Remembers where it was sent."""

    def __init__(self, device):
        self.device, self.sent = torch.device(device), []

    def parameters(self):
        yield SimpleNamespace(device=self.device)

    def to(self, device):
        self.device = torch.device(device)
        self.sent.append(self.device.type)
        return self


@pytest.fixture(autouse=True)
def no_device_to_clear(monkeypatch):
    monkeypatch.setattr(resting, "_free", lambda device: None)


def parts(unet, vae, text_encoder):
    return SimpleNamespace(unet=Part(unet), vae=Part(vae), text_encoder=Part(text_encoder))


def places(pipeline):
    return [getattr(pipeline, name).device.type for name in ("unet", "vae", "text_encoder")]


@pytest.mark.parametrize(("text", "left"), [(False, "cpu"), (True, "mps")])
def test_after_caching_the_encoders_leave(text, left):
    pipeline = parts(unet=CPU, vae=GPU, text_encoder=GPU)
    resting.settle(pipeline, GPU, text=text)
    assert places(pipeline) == ["cpu", "cpu", left]


def test_what_rests_is_awake_for_as_long_as_it_lasts():
    pipeline = parts(unet=GPU, vae=CPU, text_encoder=CPU)
    with resting.awake(pipeline, torch.device("mps")):
        assert places(pipeline) == ["mps", "mps", "mps"]
    assert places(pipeline) == ["mps", "cpu", "cpu"]
    assert pipeline.unet.sent == []


def test_nothing_stays_on_the_device_after_an_error():
    pipeline = parts(unet=CPU, vae=GPU, text_encoder=CPU)
    with pytest.raises(MemoryError), resting.awake(pipeline, GPU):
        raise MemoryError
    assert places(pipeline) == ["cpu", "mps", "cpu"]

    def full(device):
        Part.to(pipeline.text_encoder, device)
        if device == GPU:
            raise torch.OutOfMemoryError

    pipeline.text_encoder.to = full
    with pytest.raises(torch.OutOfMemoryError), resting.awake(pipeline, GPU):
        pytest.fail("came in")
    assert places(pipeline) == ["cpu", "mps", "cpu"]


def test_on_a_cpu_nothing_moves():
    pipeline = tiny_pipeline()
    before = [parameter.data_ptr() for parameter in pipeline.unet.parameters()]
    resting.settle(pipeline, CPU, text=False)
    with resting.awake(pipeline, CPU):
        pass
    assert [parameter.data_ptr() for parameter in pipeline.unet.parameters()] == before


@pytest.mark.parametrize(("device", "there"), [("meta", False), ("cpu", True)])
def test_a_text_encoder_at_rest_is_no_part_of_what_trains(device, there):
    pipeline = tiny_pipeline()
    objective = Objective.of(pipeline.scheduler, DiffusionConfig())
    model = Denoiser(pipeline.unet.to(device), objective, pipeline.text_encoder)
    assert any(name.startswith("text_encoder") for name, _ in model.named_parameters()) == there
    assert (model.text_encoder is pipeline.text_encoder) == there


# Who wakes them


class Pipeline:
    """Takes pictures, and notes where its parts were."""

    def __init__(self):
        self.unet, self.vae, self.text_encoder = Part(GPU), Part(CPU), Part(CPU)
        self.scheduler = self.base_scheduler = None
        self.seen = []

    def __call__(self, *_, **__):
        self.seen.append(places(self))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])


@pytest.fixture
def accelerator():
    return SimpleNamespace(
        device=GPU,
        is_main_process=True,
        process_index=0,
        num_processes=1,
        autocast=nullcontext,
        wait_for_everyone=lambda: None,
    )


def previewed(pipeline, accelerator, folder, monkeypatch):
    config = PreviewConfig(prompts=["a dog"], resolution=32)
    method = SimpleNamespace(model=nn.Linear(1, 1), pipeline=lambda: pipeline)
    Previews(folder, config, accelerator, start=0).base(method)


def examined(pipeline, accelerator, folder, monkeypatch):
    class Eye:
        better, counts = {"kid": "less"}, {}

        def __call__(self, pipeline, *, folder):
            pipeline()
            return {"kid": 0.5}

    method = SimpleNamespace(model=nn.Linear(1, 1), pipeline=lambda: pipeline)
    config = EvaluationConfig(every=1)
    examination = Examination(Eye(), config, folder, accelerator, start=0)
    assert examination.run(method, 1) is not None


def of_a_class(pipeline, accelerator, folder, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda pipeline, *_, **__: pipeline())
    how = SimpleNamespace(class_steps=1, class_guidance=1.0, class_batch_size=1)
    config = SimpleNamespace(dreambooth=how)
    made_pictures._generate([], folder, pipeline, config, accelerator)


@pytest.mark.parametrize("make", [previewed, examined, of_a_class])
def test_whoever_makes_pictures_wakes_all_that_makes_them(make, accelerator, tmp_path, monkeypatch):
    pipeline = Pipeline()
    make(pipeline, accelerator, tmp_path, monkeypatch)
    assert pipeline.seen == [["mps", "mps", "mps"]]
    assert places(pipeline) == ["mps", "cpu", "cpu"]
