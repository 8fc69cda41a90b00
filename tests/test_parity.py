"""Whole runs of every method against tests/reference.py: the same pictures, noise and steps give
the same weights, losses and gradient norms, in one process or two, however the batch is cut.

The two meet only where the batches and first weights of a run are recorded, as the loop gets them.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from tests import reference
from tests.reference import Batch, Weights
from tests.runs import ROOT, arguments, finish, launch
from tests.tiny import tiny_pipeline
from train import loop

# eps is so large that a step is in proportion to its gradient, and clip_norm below the norms that
# occur: a loss of the wrong size shows as well as one of the wrong direction.
RATE, TEXT_RATE, TOKEN_RATE, DECAY, EPS, CLIP, STEPS = 1e-2, 3e-3, 2e-2, 0.1, 1e-3, 0.01, 4
SETTINGS = [
    f"train.steps={STEPS}",
    "train.batch_size=8",
    f"train.clip_norm={CLIP}",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    f"optim.learning_rate={RATE}",
    f"optim.text_encoder.learning_rate={TEXT_RATE}",
    f"optim.tokens.learning_rate={TOKEN_RATE}",
    f"optim.weight_decay={DECAY}",
    f"optim.eps={EPS}",
    "preview.every=0",
]


class Base:
    """A base as it lies on the disk, in float64."""

    def __init__(self, folder: Path) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").double()
        self.text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").double()
        self.unet.requires_grad_(False)
        self.text.requires_grad_(False)


def layers(base: Base, weights: Weights) -> tuple[Weights, Weights]:
    """What the weights of a run make of the UNet's and the text encoder's, adapters merged."""
    unet, text = (reference.part(weights, prefix) for prefix in ("unet.", "text_encoder."))
    if not any(".lora_A" in name for name in weights):
        return unet, text
    return reference.merged(base.unet, unet, scale=6 / 2), reference.merged(
        base.text, text, scale=2 / 4
    )


def losses(base: Base, weights: Weights, batch: Batch, **options: Any) -> torch.Tensor:
    unet, text = layers(base, weights)
    if "input_ids" in batch:
        embeddings = reference.encoded(base.text, text, batch["input_ids"])
    else:
        embeddings = batch["prompt_embeds"].double()
    return reference.losses(batch, reference.unet(base.unet, unet), embeddings, **options)


def mean(base: Base, weights: Weights, batch: Batch) -> torch.Tensor:
    return losses(base, weights, batch).mean()


def with_class(base: Base, weights: Weights, batch: Batch) -> torch.Tensor:
    """Mean over the subject's pictures plus half the mean over the class's."""
    subject, classes = losses(base, weights, batch).chunk(2)
    return subject.mean() + 0.5 * classes.mean()


def with_prior(base: Base, weights: Weights, batch: Batch) -> torch.Tensor:
    """As above, the class's target being what the base predicts for the same text."""
    half = len(batch["prior"]) // 2
    assert batch["prior"].tolist() == [False] * half + [True] * half
    text = None
    if "input_ids" in batch:
        text = reference.encoded(base.text, {}, batch["input_ids"])
    prior = reference.unet(base.unet, {})
    subject, classes = losses(base, weights, batch, prior=prior, prior_text=text).chunk(2)
    return subject.mean() + 0.5 * classes.mean()


def new_rows(base: Base, weights: Weights, batch: Batch) -> torch.Tensor:
    """The new words' embeddings follow the table's, and are no longer than its longest."""
    (rows,) = (name for name in weights if name.endswith(".rows"))
    name = rows.removesuffix("rows") + "weight"
    table = base.text.get_parameter(name.removeprefix("text_encoder."))
    others = {n: value for n, value in weights.items() if n != rows}
    unet, _ = layers(base, others)
    longest, lengths = table.norm(dim=1).max(), weights[rows].norm(dim=1, keepdim=True)
    values = torch.where(lengths > longest, weights[rows] * longest / lengths, weights[rows])
    table = torch.cat([table, values])
    text = reference.encoded(
        base.text, {name.removeprefix("text_encoder."): table}, batch["input_ids"]
    )
    return reference.losses(batch, reference.unet(base.unet, unet), text).mean()


@dataclass(frozen=True)
class Method:
    entry: str
    loss: Callable[[Base, Weights, Batch], torch.Tensor]
    overrides: tuple[str, ...] = ()


LORA = (
    "lora.rank=2",
    "lora.alpha=6",
    "lora.dropout=0",
    "lora.targets=[attention,proj,feed_forward,convolution]",
)
TEXT_LORA = ("lora.text_encoder.rank=4", "lora.text_encoder.alpha=2")
CLASS = (
    "dreambooth.class_prompt=a box",
    "dreambooth.class_path={world}/class",
    "dreambooth.prior_weight=0.5",
)
PRIOR = (CLASS[0], CLASS[2], "dreambooth.prior=prediction")
TOKEN = "textual_inversion.tokens=[{{token: <box>, initial: a box, vectors: 3}}]"
METHODS = {
    "lora": Method("lora", mean, LORA),
    "lora, text encoder": Method("lora", mean, LORA + TEXT_LORA),
    "full": Method("full", mean),
    "full, text encoder": Method("full", mean, ("full.text_encoder=true",)),
    "dreambooth": Method("dreambooth", with_class, LORA + TEXT_LORA + CLASS),
    "dreambooth in full": Method(
        "dreambooth", with_class, (*CLASS, "lora=null", "dreambooth.text_encoder=true")
    ),
    "dreambooth, prior prediction": Method("dreambooth", with_prior, LORA + PRIOR),
    "dreambooth in full, prior prediction": Method(
        "dreambooth", with_prior, (*PRIOR, "lora=null", "dreambooth.text_encoder=true")
    ),
    "textual inversion": Method("textual_inversion", new_rows, (TOKEN,)),
    "pivotal tuning": Method("textual_inversion", new_rows, (TOKEN, *LORA)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and 11 pictures of one shape, so that there are steps of 8 and of 3 samples, or with a
    class beside them of 2 times 4 and 2 times 3."""
    folder = tmp_path_factory.mktemp("world")
    tiny_pipeline().save_pretrained(folder / "base")
    for name, red in (("pictures", 0), ("class", 35)):
        (folder / name).mkdir()
        for number in range(11):
            picture = Image.new("RGB", (64, 64), (red + 20 * number, 255 - 20 * number, 90))
            picture.paste((255, 255, 255), (number, 2 * number, 30 + number, 40))
            picture.save(folder / name / f"{number}.png")
            (folder / name / f"{number}.txt").write_text(f"a box {number}")
    return folder


def settings(method: Method, world: Path, output: Path, micro_batch_size: int) -> list[str]:
    values = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
    del values["lora"]
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    cut = f"train.micro_batch_size={micro_batch_size}"
    changed = [*SETTINGS, *(text.format(world=world) for text in method.overrides), cut]
    return [f"--config={config}", *arguments(world, output, *changed)[1:]]


def recorded(entry: str, args: list[str]) -> tuple[Weights, list[Batch]]:
    """Runs an entry in this process; its first weights and global batches."""
    seen: list = []
    fit = loop.fit

    def recording(method, batches, config, accelerator, judge, publish):
        named = method.model.named_parameters()
        seen.append({n: p.detach().clone() for n, p in named if p.requires_grad})
        seen.append([joined(micro_batches) for micro_batches in batches(0)])
        fit(method, batches, config, accelerator, judge, publish)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "fit", recording)
        importlib.import_module(f"train.{entry}").main(args)
    return seen[0], seen[1]


def joined(micro_batches: list[Batch]) -> Batch:
    tensors = [name for name, value in micro_batches[0].items() if torch.is_tensor(value)]
    return {name: torch.cat([batch[name] for batch in micro_batches]) for name in tensors}


def assert_as_expected(output: Path, start: Weights, weights: Weights, history) -> None:
    """All that trains has moved, to where the reference says."""
    found = load_file(output / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    assert found.keys() == weights.keys() == start.keys()
    for name, value in weights.items():
        assert not torch.equal(found[name], start[name]), name
        assert float((found[name] - value).abs().max()) < 1e-5, name
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    logged = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    torch.testing.assert_close(logged, history, atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def reference_run(world, tmp_path_factory):
    """From a method's name to the run that was recorded, its first weights, and the weights and
    history that the reference has of it."""

    @cache
    def run(name):
        method = METHODS[name]
        output = tmp_path_factory.mktemp("runs") / "run"
        start, batches = recorded(method.entry, settings(method, world, output, 2))
        assert len({len(batch["weight"]) for batch in batches}) == 2
        result = reference.train(
            start,
            partial(method.loss, Base(world / "base")),
            batches,
            rate_and_decay,
            eps=EPS,
            clip=CLIP,
        )
        return output, start, *result

    return run


def rate_and_decay(name: str, weight: torch.Tensor) -> tuple[float, float]:
    if name.endswith(".rows"):
        return TOKEN_RATE, 0.0
    rate = TEXT_RATE if name.startswith("text_encoder.") else RATE
    return rate, DECAY if weight.ndim > 1 else 0.0


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_the_reference(reference_run, name):
    """In one process, with four micro-batches to a batch of eight."""
    output, start, weights, history = reference_run(name)
    assert min(norm for _, norm in history) > CLIP
    assert_as_expected(output, start, weights, history)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_without_accumulation_is_the_reference(reference_run, world, tmp_path, name):
    _, *expected = reference_run(name)
    recorded(METHODS[name].entry, settings(METHODS[name], world, tmp_path / "run", 8))
    assert_as_expected(tmp_path / "run", *expected)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [4, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_in_two_processes_is_the_reference(
    reference_run, world, tmp_path, name, micro_batch_size
):
    """Without accumulation and with four micro-batches each, also where a batch of three leaves
    one of them a sample short."""
    _, *expected = reference_run(name)
    args = settings(METHODS[name], world, tmp_path / "run", micro_batch_size)
    finish(launch(f"train/{METHODS[name].entry}.py", *args, processes=2))
    assert_as_expected(tmp_path / "run", *expected)
