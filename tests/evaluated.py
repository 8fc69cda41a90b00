"""Evaluated runs as eval/compare.py finds them, with pictures of one colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.scores import FORMAT, Score, Value

SETTINGS = {
    "protocol": "held_out",
    "noun": None,
    "subject": None,
    "steps": 15,
    "guidance": 2,
    "seed": 1_000_000,
    "resize": "clean",
    "scheduler": {"_class_name": "DDIMScheduler"},
    "dtype": "float32",
    "device": "cpu",
}
EXTRACTOR = {"name": "clip", "sha256": "ab" * 32, "resize": "clean", "dimension": 64}


def evaluated(
    run: Path,
    *,
    prompts: int = 12,
    each: int = 2,
    gain: float = 0.0,
    noise: float = 0.01,
    seed: int = 0,
    grey: int = 100,
    subject: str | None = None,
    **more: Any,
) -> Path:
    """A run whose CLIP cosines are the prompts' own plus `gain` and noise of this `seed`; `more` is
    added to metrics.json."""
    easy = np.random.default_rng(99).normal(0.3, 0.03, size=prompts)
    rng = np.random.default_rng(seed)
    samples = []
    for k in range(prompts * each):
        file = run / f"eval/finetuned/{k:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (grey, k, 0)).save(file)
        cosine = float(easy[k // each] + gain + noise * rng.normal())
        samples.append(
            {
                "prompt": f"{subject or 'a dog'} number {k // each}",
                "seed": 1_000_000 + k,
                "size": [8, 8],
                "pictures": {"finetuned": f"finetuned/{k:05d}.png", "base": "base/gone.png"},
                "scores": {"clip_score": {"base": 0.2, "finetuned": cosine}},
            }
        )
    fid = Score("FID", "less", {"finetuned": Value(20 + grey / 100, 19.0, 23.0)}, "how")
    clip = Score("CLIP score", "more", {"finetuned": Value(30.0)}, "how")
    content = {
        "format": FORMAT,
        "samples": samples,
        "scores": {"fid": fid.as_dict(), "clip_score": clip.as_dict()},
        "extractors": {"clip": EXTRACTOR},
        "reference": {"pictures": 64, "sha256": "cd" * 32},
        "training": None,
        "settings": {**SETTINGS, "subject": subject},
    }
    (run / "eval/metrics.json").write_text(json.dumps(content | more))
    return run
