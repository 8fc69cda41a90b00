"""Equal steps, data and model: no method's held-out loss is worse than a plain loop's.

The plain loop (tests/plain_loop.py) shares no code with the project and draws its own samples and
noise, so the two differ by chance; held-out pictures, noise and timesteps are the same for both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from data import toy
from tests import plain_loop
from train import dreambooth, full, lora, models, textual_inversion

BASE = Path(__file__).resolve().parent.parent / "data/assets/toy-base"
STEPS, BATCH = 80, 8

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures of a style, of a subject by two names, and of the subject's class; some held out."""
    folder = tmp_path_factory.mktemp("world")
    sets = {
        "style": {"style": "mosaic"},
        "subject": {"subject": "owl", "name": "zwx circle"},
        "token": {"subject": "owl", "name": "<owl>"},
        "class": {},
    }
    for name, options in sets.items():
        for part, seed in (("train", 0), ("held-out", 1)):
            toy.write_pictures(folder / name / part, 24, seed=seed, square=True, **options)
            for file in (folder / name / part).glob("*.png"):
                plain_loop.halve(file)
    return folder


def arguments(world: Path, output: Path, data: str, *more: str, rate: float) -> list[str]:
    return [
        f"output={output}",
        f"model.path={BASE}",
        f"data.path={world / data / 'train'}",
        f"data.cache={world / 'cache'}",
        "data.resolution=64",
        "data.bucket_step=8",
        "data.caption_dropout=0.1",
        "data.workers=0",
        f"train.steps={STEPS}",
        f"train.batch_size={BATCH}",
        f"optim.learning_rate={rate}",
        f"optim.final_learning_rate={rate / 100}",
        "preview.every=0",
        *more,
    ]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "empty.yaml"
    file.write_text("{}\n")
    return f"--config={file}"


def base():
    pipeline = models.load_pipeline(str(BASE))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def with_adapter(rank: int):
    pipeline = base()
    torch.manual_seed(3)
    pipeline.unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
    )
    return pipeline


def trainable(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def no_worse(ours, plain, folder):
    """By the paired differences of the held-out pictures' losses."""
    data = plain_loop.read(folder)
    before, mine, theirs = (plain_loop.held_out(p, data) for p in (base_like(plain), ours, plain))
    difference = mine - theirs
    error = difference.std() / len(difference) ** 0.5
    assert theirs.mean() < before.mean(), "the plain loop has learned nothing"
    assert mine.mean() < before.mean()
    assert difference.mean() < 2 * error + 0.01 * theirs.mean(), (mine.mean(), theirs.mean())


def base_like(pipeline):
    """The base, with the words that the pipeline knows."""
    fresh = base()
    new = sorted(set(pipeline.tokenizer.get_added_vocab()) - set(fresh.tokenizer.get_added_vocab()))
    if new:
        plain_loop.add_token(fresh, new[0], "purple circle")
    return fresh


def test_lora(world, tmp_path, empty):
    run = arguments(world, tmp_path / "run", "style", "lora.rank=8", "lora.alpha=8", rate=1e-3)
    lora.main([empty, *run])
    ours = base()
    ours.load_lora_weights(str(tmp_path / "run" / "adapter"))
    plain = with_adapter(8)
    data = plain_loop.read(world / "style" / "train")
    plain_loop.train(plain, trainable(plain.unet), data, steps=STEPS, batch=BATCH, rate=1e-3)
    no_worse(ours, plain, world / "style" / "held-out")


def test_full(world, tmp_path, empty):
    full.main([empty, *arguments(world, tmp_path / "run", "style", rate=1e-4)])
    ours = models.load_pipeline(str(tmp_path / "run" / "full"))
    plain = base()
    plain.unet.requires_grad_(True)
    data = plain_loop.read(world / "style" / "train")
    plain_loop.train(plain, trainable(plain.unet), data, steps=STEPS, batch=BATCH, rate=1e-4)
    no_worse(ours, plain, world / "style" / "held-out")


def test_dreambooth(world, tmp_path, empty):
    run = arguments(
        world,
        tmp_path / "run",
        "subject",
        "lora={rank: 8, alpha: 8}",
        "dreambooth.class_prompt=a photo of a circle",
        f"dreambooth.class_path={world / 'class' / 'train'}",
        f"train.batch_size={2 * BATCH}",
        rate=1e-3,
    )
    dreambooth.main([empty, *run])
    ours = base()
    ours.load_lora_weights(str(tmp_path / "run" / "adapter"))
    plain = with_adapter(8)
    plain_loop.train(
        plain,
        trainable(plain.unet),
        plain_loop.read(world / "subject" / "train"),
        class_data=plain_loop.read(world / "class" / "train"),
        steps=STEPS,
        batch=BATCH,
        rate=1e-3,
    )
    no_worse(ours, plain, world / "subject" / "held-out")
    no_worse_on_class = plain_loop.read(world / "class" / "held-out")
    mine, theirs = (plain_loop.held_out(p, no_worse_on_class) for p in (ours, plain))
    assert mine.mean() < 1.05 * theirs.mean()


def test_textual_inversion(world, tmp_path, empty):
    token = "[{token: <owl>, initial: purple circle, vectors: 1}]"
    run = arguments(
        world,
        tmp_path / "run",
        "token",
        f"textual_inversion.tokens={token}",
        "textual_inversion.captions=own",
        "optim.tokens.learning_rate=0.01",
        rate=1e-2,
    )
    textual_inversion.main([empty, *run])
    ours = base()
    ours.load_textual_inversion(str(tmp_path / "run" / "adapter"))
    plain = base()
    row = plain_loop.add_token(plain, "<owl>", "purple circle")
    weight = plain.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    kept = weight.detach().clone()

    def restore() -> None:
        others = torch.arange(len(weight)) != row
        weight.data[others] = kept[others]

    data = plain_loop.read(world / "token" / "train")
    plain_loop.train(
        plain,
        [weight],
        data,
        steps=STEPS,
        batch=BATCH,
        rate=1e-2,
        weight_decay=0,
        after_step=restore,
    )
    no_worse(ours, plain, world / "token" / "held-out")
