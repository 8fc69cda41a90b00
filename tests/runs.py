"""Tiny training runs for end-to-end tests: a base, pictures and the arguments of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data import toy
from eval.generation import to_uint8
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent


def make_world(folder: Path, *, pictures: int = 9) -> Path:
    """folder/base and folder/pictures: a tiny pipeline, and 64-pixel pictures in three shapes."""
    tiny_pipeline().save_pretrained(folder / "base")
    toy.write_pictures(folder / "large", pictures, seed=0)
    (folder / "pictures").mkdir()
    for path in (folder / "large").glob("*.png"):
        picture = Image.open(path)
        picture.reduce(2).save(folder / "pictures" / path.name)
        text = path.with_suffix(".txt").read_text()
        (folder / "pictures" / path.name).with_suffix(".txt").write_text(text)
    return folder


def arguments(world: Path, output: Path, *overrides: str) -> list[str]:
    """A LoRA run of six steps in a few seconds; later overrides win."""
    return [
        f"--config={ROOT / 'tests' / 'tiny.yaml'}",
        f"output={output}",
        f"model.path={world / 'base'}",
        f"data.path={world / 'pictures'}",
        f"data.cache={world / 'cache'}",
        *overrides,
    ]


def launch(entry: str, *args: str, processes: int = 1, **options: object) -> subprocess.Popen[str]:
    """An entry as its own process, or as several joined by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    runner = [sys.executable] if processes == 1 else [*torchrun, f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*runner, str(ROOT / entry), *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    """Waits for the process, which must exit with `code`; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def preview_again(pipeline: Any, prompt: str, *, seed: int) -> np.ndarray:
    """What the previews of tests/tiny.yaml would show, uint8 (64, 64, 3)."""
    return to_uint8(drawn(pipeline, prompt, seed, "np"))


def drawn(pipeline: Any, prompt: str, seed: int, kind: str = "pil") -> np.ndarray:
    """The same as the pipeline gives it, as `kind` of output."""
    image = pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=2,
        generator=torch.Generator().manual_seed(seed),
        width=64,
        height=64,
        output_type=kind,
    ).images[0]
    return np.asarray(image)
