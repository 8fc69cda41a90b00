"""Evaluations as metrics.json has them, with pictures of the toy world: to look at and to test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.toy import BACKGROUNDS, SHAPES, caption, render, sample_scene
from eval.scores import ARMS, FORMAT, Change, Score, Value

Picture = Callable[[str, str], np.ndarray | None]
NAME, CLASS = "owl circle", "circle"


def picture(
    index: int, *, subject: str | None = None, style: str | None = None, side: int = 128
) -> np.ndarray:
    """A toy picture (side, side, 3)."""
    scene = sample_scene(5, index, width=side, height=side)
    return render(scene, side, side, subject=subject, style=style)


def real(kind: str, name: str) -> np.ndarray | None:
    """The real picture that a report asks for; there is no 'gone.png'."""
    if name == "gone.png":
        return None
    return picture(int(name.split(".")[0]) + (900 if kind == "training" else 700), subject="owl")


def score(
    title: str, better: str | None, values: dict[str, float], half: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A score whose intervals reach `half` up and down; the change is from base_class or base."""
    spread = {
        arm: Value(v, v - half, v + half, 48) if half else Value(v, n=48)
        for arm, v in values.items()
    }
    against = "base_class" if "base_class" in values else "base"
    before = values.get(against)
    change = None
    if before is not None and "finetuned" in values and half:
        moved = values["finetuned"] - before
        change = Change(moved, moved - 1.2 * half, moved + 1.2 * half, 0.0004, 1.32)
    how = more.pop("how", f"How {title} came about, with its source (Someone et al. 2022).")
    return Score(title, better, spread, how, change, against, **more).as_dict()  # type: ignore[arg-type]


def subject_run(folder: Path, *, prompts: int = 12, per_prompt: int = 4, side: int = 128) -> Any:
    """The content of metrics.json of a subject with everything there can be; writes pictures."""
    rng = np.random.default_rng(0)
    samples = []
    for k in range(prompts * per_prompt):
        scene = sample_scene(5, k // per_prompt)
        moved = rng.normal(0.18, 0.12)
        pictures = {}
        for arm, subject in (("base", None), ("base_class", None), ("finetuned", "owl")):
            number = 3 * k + (arm == "base_class")
            pictures[arm] = save(folder, arm, k, picture(number, subject=subject, side=side))
        samples.append(
            {
                "prompt": f"{k // per_prompt + 1}: {caption(scene, name=NAME)}",
                "class_prompt": caption(scene, name=CLASS),
                "seed": 1_000_000 + k,
                "size": [side, side],
                "pictures": pictures,
                "scores": {
                    "dino": {"base": 0.31, "base_class": 0.33, "finetuned": 0.33 + moved},
                    "clip_t": {"base": 0.29, "base_class": 0.31, "finetuned": 0.30},
                },
                "nearest_training": {"id": f"{k % 8}.png", "similarity": 0.8 + 0.003 * k},
                "nearest_held_out": {"id": f"{k % 24}.png", "similarity": 0.8 + 0.002 * k},
            }
        )
    return _written(folder, _subject_content(folder, samples, side))


def style_run(folder: Path, *, images: int = 40, side: int = 128) -> Any:
    """The content of metrics.json of a style, with no more than fid, kid and clip_score."""
    rng = np.random.default_rng(1)
    grounds = list(BACKGROUNDS)
    samples = [
        {
            "prompt": f"a {SHAPES[k % 6]} on a {grounds[k // 6 % 6]} background, ink style",
            "class_prompt": None,
            "seed": 1_000_000 + k,
            "size": [side, side],
            "pictures": {
                "base": save(folder, "base", k, picture(k, side=side)),
                "finetuned": save(folder, "finetuned", k, picture(k, style="ink", side=side)),
            },
            "scores": {"clip_score": {"base": 0.31, "finetuned": 0.31 + rng.normal(-0.002, 0.01)}},
            "nearest_training": None,
            "nearest_held_out": None,
        }
        for k in range(images)
    ]
    scores = {
        "fid": score("FID", "less", {"base": 26.2, "finetuned": 12.5}, 2.1, warning=_SMALL),
        "kid": score("KID", "less", {"base": 0.0124, "finetuned": 0.0061}, 0.0011),
        "clip_score": score("CLIP score", "more", {"base": 31.0, "finetuned": 30.8}, 0.6)
        | {"facts": {"convention": "100 x max(cos, 0)", "prompts": 36}},
    }
    return _written(
        folder,
        _common("toy-lora", scores, samples)
        | {
            "keep": "keep",
            "verdict": "Fine-tuning brought the pictures closer to the held-out ones (FID 26.20 to "
            "12.50, −52.3 %), and they follow the prompts about as well as before (CLIP score "
            "31.00 to 30.80, −0.6 %).",
            "power": ["CLIP score: With 36 prompts you can see differences of about 0.82."],
            "reference": {"pictures": 64, "sha256": "cd" * 32},
        },
    )


def folders(folder: Path, *, images: int = 8) -> Any:
    """The content of metrics.json of two folders: one arm, no prompts."""
    samples = [
        {
            "pictures": {"finetuned": save(folder, "finetuned", k, picture(k))},
            "size": [128, 128],
            "nearest_held_out": {"id": f"{k}.png", "similarity": 0.9},
        }
        for k in range(images)
    ]
    content = _common("mine against theirs", {}, samples) | {"kind": "folders"}
    content["scores"] = {"fid": score("FID", "less", {"finetuned": 12.5}, 2.1, warning=_SMALL)}
    content["arms"] = {"finetuned": "images"}
    del content["keep"], content["settings"]
    return _written(folder, content | {"verdict": "FID 12.5 between 8 and 8 pictures."})


def save(folder: Path, arm: str, k: int, pixels: np.ndarray) -> str:
    """The address of the picture written, relative to the folder."""
    path = folder / arm / f"{k:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return f"{arm}/{path.name}"


_SMALL = (
    "48 pictures are few for 768 dimensions: two sets as small as these from one distribution "
    "would already score about 5.5. Read the change, not the value."
)


def _written(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False)
    (folder / "metrics.json").write_text(text)
    return json.loads(text)


def _common(title: str, scores: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What every evaluation has."""
    clip = {"name": "openai/clip-vit-large-patch14", "sha256": "ab" * 32, "dimension": 768}
    clip |= {"resize": "clean bicubic to 224x224"}
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    having = {arm for each in scores.values() for arm in each["values"]}
    return {
        "format": FORMAT,
        "title": title,
        "keep": "keep",
        "verdict": "",
        "warnings": [],
        "arms": {arm: title for arm, title in ARMS.items() if arm in having},
        "scores": scores,
        "power": [],
        "samples": samples,
        "general": [],
        "prior": [],
        "memorisation": None,
        "curves": {"checkpoints": [], "scales": []},
        "extractors": {"clip": clip, "features": clip},
        "reference": None,
        "training": None,
        "settings": {
            "protocol": "held_out",
            "subject": None,
            "noun": None,
            "result": "adapter",
            "steps": 25,
            "guidance": 7.5,
            "batch_size": 8,
            "seed": 1_000_000,
            "scheduler": scheduler,
            "dtype": "float32",
            "device": "cpu",
            "weights": {"base": {"unet": "12" * 32}, "finetuned": {"unet": "34" * 32}},
        },
    }


def _subject_content(folder: Path, samples: list[dict[str, Any]], side: int) -> dict[str, Any]:
    content = _common("toy-dreambooth", _subject_scores(), samples)
    content["settings"] |= {"protocol": "objects", "subject": NAME, "noun": CLASS}
    return content | {
        "keep": "leave",
        "verdict": "It copies pictures it was trained on. Fine-tuning made the pictures more like "
        "the subject (DINO 0.330 to 0.512, +55.2 %), but they follow the prompts less well (CLIP-T "
        "31.20 to 29.90, −4.2 %).",
        "warnings": [
            "There are only 12 different prompts: the intervals are rough.",
            "2 prompts are longer than CLIP reads: their end is not scored.",
            "No pictures are held out: likeness is to the pictures trained on.",
        ],
        "power": [
            "DINO: With 12 prompts you can see differences of about 0.051; 48 would show half of "
            "that.",
            "CLIP-T: With 12 prompts you can see differences of about 1.3.",
        ],
        "general": [_pair(folder, "general", k, side) | {"distance": 0.1 * k} for k in range(4)],
        "prior": [_pair(folder, "prior", k, side) for k in range(4)],
        "memorisation": {
            "flagged": True,
            "judged": True,
            "said": "12 of 48 pictures are nearer to a training picture than any real view is "
            "(0.98 against 0.95): the model copies.",
            "share": 0.25,
            "low": 0.14,
            "high": 0.37,
            "threshold": 0.95,
            "space": "layout",
            "pairs": [
                {"sample": k, "id": f"{k}.png", "similarity": 0.99 - 0.01 * k, "suspicious": k < 4}
                for k in range(8)
            ],
        },
        "curves": _curves(folder, side),
        "extractors": content["extractors"]
        | {
            "dino": {
                "name": "facebook/dino-vits16",
                "sha256": "ef" * 32,
                "dimension": 384,
                "resize": "clean bicubic to 224x224",
            }
        },
        "reference": {"pictures": 24, "sha256": "cd" * 32},
        "training": {"pictures": 8, "sha256": "de" * 32},
    }


def _subject_scores() -> dict[str, Any]:
    three = ("base", "base_class", "finetuned", "real", "training")

    def of(*values: float) -> dict[str, float]:
        return dict(zip(three, values, strict=False))

    pair = ("base", "finetuned")
    points = {"facts": {"convention": "100 x max(cos, 0)", "prompts": 12, "pictures": 48}}
    return {
        "dino": score("DINO", "more", of(0.312, 0.330, 0.512, 0.774, 0.99), 0.03),
        "clip_i": score("CLIP-I", "more", of(0.601, 0.633, 0.780, 0.885, 0.97), 0.02),
        "clip_t": score("CLIP-T", "more", of(30.1, 31.2, 29.9), 0.8) | points,
        "clip_score": score("CLIP score", "more", dict(zip(pair, (29.0, 30.4), strict=True)), 0.9)
        | points,
        "diversity": score("Diversity", "more", dict(zip(pair, (0.41, 0.22), strict=True)), 0.03),
        "prior_preservation": score(
            "Class turned into the subject",
            "less",
            dict(zip(pair, (0.33, 0.37), strict=True)),
            0.03,
        ),
        "forgetting": score("Forgetting", "less", {"finetuned": 0.34}, 0.05),
        "copies": score(
            "Copies", "less", {"finetuned": 0.25}, 0.11, warning="Judged by pixel layout."
        ),
    }


def _pair(folder: Path, kind: str, k: int, side: int) -> dict[str, Any]:
    changed = "owl" if k == 3 else None
    return {
        "prompt": f"{kind} prompt {k}: a bowl of fruit on a wooden table",
        "seed": k,
        "size": [side, side],
        "pictures": {
            "base": save(folder, f"{kind}/base", k, picture(50 + k, side=side)),
            "finetuned": save(
                folder, f"{kind}/finetuned", k, picture(50 + k, subject=changed, side=side)
            ),
        },
    }


def _curves(folder: Path, side: int) -> dict[str, Any]:
    steps = [0, 100, 200, 300, 400]
    scales = (0.0, 0.25, 0.5, 0.75, 1.0)
    return {
        "checkpoints": [
            {
                "step": s,
                "scores": {"dino": 0.33 + 0.2 * (1 - 2 ** (-s / 150)), "clip_t": 31 - k / 3},
            }
            for k, s in enumerate(steps)
        ],
        "scales": [
            {
                "scale": scale,
                "scores": {
                    "clip_i": {
                        "value": 0.63 + 0.15 * scale,
                        "low": 0.6 + 0.15 * scale,
                        "high": 0.81,
                    }
                    | {"n": 8},
                    "clip_t": {"value": 31.2 - scale, "low": None, "high": None},
                },
                "pictures": [
                    save(
                        folder,
                        f"scale-{scale:g}",
                        k,
                        picture(k, subject="owl" if scale > 0.4 else None, side=side),
                    )
                    for k in range(4)
                ],
                "prompts": [f"prompt {k} of the sweep" for k in range(4)],
            }
            for scale in scales
        ],
    }
