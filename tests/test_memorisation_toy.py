"""A toy DreamBooth that was trained until it copies is told from one that was stopped early, and
its best checkpoint is one that another judge prefers too."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from data import toy
from eval.features import load_extractor, read_rgb
from eval.generation import generate
from eval.memorisation import Memorisation, layout, memorisation, most_suspicious
from eval.significance import paired
from scripts.toy.checker import load_checker
from train import dreambooth
from train.config import ROOT

VIEWS = 24


@pytest.fixture(scope="module")
def owls(tmp_path_factory) -> Path:
    """Four pictures to train on, and other views."""
    folder = tmp_path_factory.mktemp("owls")
    for name, count, seed in (("four", 4, 101), ("held-out", VIEWS, 13)):
        toy.write_pictures(
            folder / name, count, seed=seed, subject="owl", name="owl circle", square=True
        )
    return folder


def trained(owls: Path, steps: int, *more: str, output: Path | None = None) -> Path:
    """Every weight, at a rate far too high, with one caption for all and nothing kept of the
    class."""
    output = output or owls / f"{steps}-steps"
    dreambooth.main(
        [
            f"--config={ROOT / 'configs/toy/dreambooth.yaml'}",
            f"output={output}",
            f"model.path={ROOT / 'data/assets/toy-base'}",
            f"data.path={owls / 'four'}",
            f"data.cache={owls / 'cache'}",
            "data.captions.replace=an owl circle",
            "data.workers=0",
            "dreambooth.prior=none",
            "lora=null",
            "dreambooth.text_encoder=true",
            f"train.steps={steps}",
            "train.batch_size=4",
            "optim.learning_rate=2e-3",
            "optim.text_encoder.learning_rate=1e-3",
            "optim.final_learning_rate=1e-4",
            "preview.every=0",
            "evaluation.path=null",
            *more,
        ]
    )
    return output / "full"


def pictures(folder: Path) -> list[np.ndarray]:
    return [read_rgb(path) for path in sorted(folder.glob("*.png"))]


def judged(owls: Path, result: Path) -> Memorisation:
    """By the toy CLIP and by layout, on what it makes of the captions of the other views."""
    captions = [path.read_text().strip() for path in sorted((owls / "held-out").glob("*.txt"))]
    pipeline = StableDiffusionPipeline.from_pretrained(result)
    pipeline.set_progress_bar_config(disable=True)
    made = result.with_name("pictures")
    generate(
        pipeline,
        captions,
        seeds=range(VIEWS),
        steps=15,
        guidance=2,
        size=(128, 128),
        batch_size=12,
        folder=made,
    )
    sets = [pictures(folder) for folder in (made, owls / "four", owls / "held-out")]
    clip = load_extractor(ROOT / "data/assets/toy-clip")
    found = []
    for space, features in (("clip", clip.images), ("layout", layout)):
        results, training, views = map(features, sets)
        found.append(memorisation(results, training, held_out=views, groups=captions, space=space))
        print(f"{result}: {space}: {found[-1].said} (p = {found[-1].p:.3f})")
    return most_suspicious(found)


@pytest.fixture(scope="module")
def copier(owls) -> Path:
    return trained(owls, 400, *examined(owls))


def examined(owls: Path) -> list[str]:
    """Scored by pictures every 80 steps."""
    return [
        f"evaluation.path={owls / 'held-out'}",
        f"evaluation.clip={ROOT / 'data/assets/toy-clip'}",
        "evaluation.every=80",
        "evaluation.quick_images=24",
        "evaluation.steps=10",
        "evaluation.guidance=2",
        "evaluation.batch_size=24",
        "validation.metric=kid",
    ]


@pytest.mark.slow
def test_a_run_trained_until_it_copies_is_flagged_and_one_stopped_early_is_cleared(owls, copier):
    early = judged(owls, trained(owls, 60))
    assert early.judged and not early.flagged, early.said
    late = judged(owls, copier)
    assert late.flagged and late.share > 0.5, late.said


@pytest.mark.slow
def test_the_best_checkpoint_is_one_that_a_judge_of_other_pictures_prefers(owls, copier):
    """KID on 24 pictures chooses; a network that was never asked says what prompts they follow."""
    run = copier.parent
    best = json.loads((run / "checkpoints/best.json").read_text())["step"]
    assert best < 400
    again = owls / "best"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("full", "pictures"))
    taken = trained(owls, 400, *examined(owls), "validation.use_best=true", output=again)
    chosen, last = (followed(result) for result in (taken, copier))
    change = paired(last, chosen)
    print(f"step {best}: {chosen.mean():.0%} as prompted, step 400: {last.mean():.0%}, {change}")
    assert change.low > 0


def followed(result: Path) -> np.ndarray:
    """Of new prompts and seeds, how much of size and background the checker finds, 0 to 1."""
    scenes = [toy.sample_scene(77, k) for k in range(72)]
    pipeline = StableDiffusionPipeline.from_pretrained(result)
    pipeline.set_progress_bar_config(disable=True)
    paths = generate(
        pipeline,
        [toy.caption(scene, name="owl circle") for scene in scenes],
        seeds=range(500, 572),
        steps=15,
        guidance=2,
        size=(128, 128),
        batch_size=24,
        folder=result.with_name("new"),
    )
    read = load_checker(ROOT / "data/assets/toy-checker").read([read_rgb(path) for path in paths])
    return np.array(
        [
            np.mean([found[name] == getattr(scene, name) for name in ("size", "background")])
            for found, scene in zip(read, scenes, strict=True)
        ]
    )
