"""What each method makes of a subject the toy base never saw: trains every one with several seeds,
judges their pictures, and writes the table and the picture of docs/methods.md.

python scripts/toy/methods.py            # into runs/toy-methods; about an hour on two CPU cores

What was done before is kept, so the same command resumes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from data import toy
from data.files import write_atomically
from train.config import ROOT, Section, UserError, command, load

if TYPE_CHECKING:
    from scripts.toy.judging import Judge

TRAINING_SEED, CLASS_SEED = 300, 203  # worlds of the training pictures, and of the class's prompts
PICTURES = 8
SUBJECT, WORD, TOKEN = "owl", "owl circle", "<owl>"
CLASS = "circle"
Examined = dict[str, list[Any]]  # pictures by what was asked for


@dataclass(frozen=True)
class Trial:
    """A way to learn the subject: an entry with the settings that differ from its toy config."""

    title: str
    entry: str
    name: str
    settings: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        return "full" if "lora=null" in self.settings else "adapter"

    @property
    def leaves_the_class(self) -> bool:
        """Whether no weight changes that a prompt without the new word would see."""
        return self.entry == "textual_inversion" and not any("lora" in s for s in self.settings)


DREAMBOOTH = ("dreambooth", WORD)
INVERSION = ("textual_inversion", TOKEN)
TRIALS = {
    "dreambooth-images": Trial(
        "DreamBooth LoRA, class images",
        *DREAMBOOTH,
        ("dreambooth.prior=images", "train.steps=600"),
    ),
    "dreambooth-prediction": Trial("DreamBooth LoRA, prior prediction", *DREAMBOOTH),
    "dreambooth-none": Trial(
        "DreamBooth LoRA, no prior", *DREAMBOOTH, ("dreambooth.prior=none", "train.batch_size=4")
    ),
    "inversion": Trial("Textual inversion", *INVERSION),
    "pivotal": Trial(
        "Pivotal tuning (textual inversion and LoRA)",
        *INVERSION,
        (
            "lora={rank: 16, alpha: 16, targets: [attention, proj, feed_forward, convolution]}",
            "train.batch_size=4",
            "train.steps=500",
            "optim.learning_rate=2e-3",
            "optim.tokens.learning_rate=1e-3",
        ),
    ),
}


class MethodsConfig(Section):
    """Compares the methods on the toy world (scripts/toy/methods.py)."""

    output: Path = Path("runs/toy-methods")
    """Folder of the runs, their pictures and methods.json."""
    model: str = "data/assets/toy-base"
    """The base."""
    trials: list[str] = list(TRIALS)
    """Which of the methods."""
    seeds: int = Field(3, ge=1)
    """Runs of each, on other training pictures each time."""
    pictures: int = Field(48, ge=2)
    """Judged per run and question."""
    steps: int = Field(15, ge=1)
    """Sampling steps."""
    guidance: float = Field(2.0, ge=0)
    """Classifier-free guidance scale."""
    document: Path | None = None
    """Folder to put methods.png into, for docs/."""


def main(arguments: list[str]) -> None:
    config = load(MethodsConfig, arguments)
    if unknown := set(config.trials) - TRIALS.keys():
        raise UserError(f"trials={sorted(unknown)}: known are {', '.join(TRIALS)}")
    from scripts.toy.judging import Judge

    judge = Judge.of(SUBJECT, views=config.pictures)
    base = examine(judge, config, None, CLASS, config.output / "pictures/base")
    for seed in range(config.seeds):
        data = write_data(config.output / "data", seed)
        before = measure(judge, config, base, seed)
        for name in config.trials:
            trial, run = TRIALS[name], config.output / f"{name}-{seed}"
            train(trial, config, data, run, seed)
            made = examine(
                judge,
                config,
                run / trial.result,
                trial.name,
                config.output / "pictures" / run.name,
                with_class=not trial.leaves_the_class,
            )
            after = measure(judge, config, made, seed)
            keep(config.output, name, seed, after | compared(judge, after, before))
    print(f"a body without a face: {judge.closed(judge.faceless, before['similarity']):.0%}")
    print(table(kept(config.output)))
    if config.document is not None:
        sheet(config).save(config.document / "methods.png", optimize=True)


def keep(output: Path, name: str, seed: int, measured: dict[str, Any]) -> None:
    """Adds a measurement to methods.json, in place of an earlier one of the same run."""
    found = kept(output)
    found.setdefault(name, {})[str(seed)] = measured
    content = json.dumps(found, indent=1, sort_keys=True) + "\n"
    write_atomically(output / "methods.json", content.encode())


def kept(output: Path) -> dict[str, Any]:
    """All measurements so far: by trial, by seed."""
    file = output / "methods.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_data(folder: Path, seed: int) -> Path:
    """Training pictures of the subject: NAME-SEED for each word it goes by."""
    for name, word in (("dreambooth", WORD), ("textual_inversion", TOKEN)):
        target = folder / f"{name}-{seed}"
        if not target.exists():
            toy.write_pictures(
                target,
                PICTURES,
                seed=TRAINING_SEED + seed,
                subject=SUBJECT,
                name=word,
                square=True,
            )
    return folder


def train(trial: Trial, config: MethodsConfig, data: Path, run: Path, seed: int) -> None:
    """Starts, resumes or finds finished the run in that directory."""
    arguments = [
        f"--config=configs/toy/{trial.entry}.yaml",
        f"output={run}",
        f"model.path={config.model}",
        f"data.path={data / f'{trial.entry}-{seed}'}",
        f"data.cache={config.output / 'cache'}",
        f"seed={seed}",
        "preview.every=0",
        "evaluation.path=null",
        *trial.settings,
    ]
    entry = ROOT / "train" / f"{trial.entry}.py"
    subprocess.run([sys.executable, str(entry), *arguments], check=True, cwd=ROOT)


def examine(
    judge: Judge,
    config: MethodsConfig,
    result: Path | None,
    name: str,
    folder: Path,
    *,
    with_class: bool = True,
) -> Examined:
    """Generates with the base, or with what a run has made of it: the subject by its name, and the
    class."""
    pipeline = open_pipeline(config.model, result)
    prompts = {"subject": [toy.caption(scene, name=name) for scene in judge.scenes]}
    if with_class:
        prompts["class"] = [toy.caption(scene) for scene in class_scenes(config.pictures)]
        prompts["free"] = [prompt for prompt in free_prompts() for _ in range(config.pictures // 6)]
    return {
        what: generated(pipeline, texts, config, folder / what) for what, texts in prompts.items()
    }


def free_prompts() -> list[str]:
    """Of the class, in any colour."""
    return [f"a medium {CLASS} on a {background} background" for background in toy.BACKGROUNDS]


def class_scenes(count: int) -> list[toy.Scene]:
    """Other members of the class."""
    found = (toy.sample_scene(CLASS_SEED, k) for k in range(100 * count))
    return list(islice((scene for scene in found if scene.shape == CLASS), count))


def measure(judge: Judge, config: MethodsConfig, pictures: Examined, seed: int) -> dict[str, Any]:
    """recombined: of the prompts whose size and background the training pictures never showed
    together."""
    subjects, unseen = pictures["subject"], judge.unseen(TRAINING_SEED + seed, PICTURES)
    found: dict[str, Any] = {
        "similarity": judge.similarity(subjects),
        "recombined": judge.recombined(
            [subjects[k] for k in unseen], [judge.scenes[k] for k in unseen]
        ),
    }
    if "class" in pictures:
        scenes = class_scenes(config.pictures)
        each = config.pictures // 6
        free = [pictures["free"][k : k + each] for k in range(0, 6 * each, each)]
        found["class"] = judge.class_kept(pictures["class"], scenes, free)
    return found


def compared(judge: Judge, measured: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """What matters of a measurement beside the base's own."""
    kept = {
        f"{what}_kept": measured.get("class", base["class"])[what] / base["class"][what]
        for what in ("accuracy", "diversity")
    }
    return {"closed": judge.closed(measured["similarity"], base["similarity"]), **kept}


def open_pipeline(model: str, result: Path | None) -> Any:
    from train import adapter_file
    from train.models import load_pipeline

    if result is not None and result.name == "full":
        return load_pipeline(str(result))
    pipeline = load_pipeline(model)
    if result is not None:
        adapter_file.apply(pipeline, [adapter_file.find(str(result))])
    return pipeline


def generated(
    pipeline: Any, prompts: Sequence[str], config: MethodsConfig, folder: Path
) -> list[Any]:
    from eval.features import read_rgb
    from eval.generation import generate

    paths = generate(
        pipeline,
        prompts,
        seeds=range(len(prompts)),
        steps=config.steps,
        guidance=config.guidance,
        size=(128, 128),
        batch_size=32,
        folder=folder,
    )
    return [read_rgb(path) for path in paths]


COLUMNS = {
    "distance closed": ("closed",),
    "size, background right": ("recombined", "asked"),
    "and the owl": ("recombined", "all"),
    "class accuracy kept": ("accuracy_kept",),
    "class diversity kept": ("diversity_kept",),
}


def table(found: dict[str, Any]) -> str:
    """Markdown: mean and spread (smallest to largest) over the seeds."""
    lines = [f"| method | {' | '.join(COLUMNS)} | runs |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, trial in TRIALS.items():
        runs = list(found.get(name, {}).values())
        if runs:
            cells = [_spread([_at(run, path) for run in runs]) for path in COLUMNS.values()]
            lines.append(f"| {trial.title} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def _at(measured: Any, path: Sequence[str]) -> float:
    for key in path:
        measured = measured[key]
    return float(measured)


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.0%}"
    return f"{np.mean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def sheet(config: MethodsConfig) -> Any:
    """The training pictures, real views, and what the base and each method make of the prompts."""
    from PIL import Image

    from scripts.toy.judging import VIEW_SEED
    from train.previews import grid

    scenes = [toy.sample_scene(VIEW_SEED, k) for k in range(8)]
    rows = [
        sorted((config.output / "data" / "dreambooth-0").glob("*.png"))[:8],
        *(
            [config.output / "pictures" / name / "subject" / f"{k:05d}.png" for k in range(8)]
            for name in ("base", *(f"{name}-0" for name in config.trials))
        ),
    ]
    pictures = [[Image.open(file).convert("RGB") for file in row] for row in rows]
    real = [Image.fromarray(toy.render(s, 128, 128, subject=SUBJECT)) for s in scenes]
    return grid([pictures[0], real, *pictures[1:]])


if __name__ == "__main__":
    command(main)
