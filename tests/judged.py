"""Runs an entry whose pictures are judged by their brightness, in place of eval/in_training.py:

torchrun --nproc-per-node=2 tests/judged.py train/lora.py key=value ...
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Brightness:
    """Every process makes one picture, of its own seed. fails: at which call the last process
    does."""

    better: Mapping[str, Any] = {"clip_score": "more"}
    counts: Mapping[str, int] = {}

    def __init__(self, accelerator: Any, fails: int = 0) -> None:
        self._accelerator, self._fails, self._calls = accelerator, fails, 0

    def __call__(self, pipeline: Any, *, folder: Path) -> dict[str, float]:
        from accelerate.utils import gather_object

        from tests.runs import preview_again
        from train.examination import together

        self._calls += 1
        here, last = self._accelerator.process_index, self._accelerator.num_processes - 1

        def mine() -> float:
            from PIL import Image

            if self._calls == self._fails and here == last:
                raise MemoryError("full")
            picture = preview_again(pipeline, "a large red circle", seed=here)
            Image.fromarray(picture).save(folder / f"{here:05d}.png")
            return float(picture.mean())

        # In all but the first process something else comes out: only that one's counts.
        return {"clip_score": sum(gather_object([together(mine)])) + here}


def judge(scoring: Any, accelerator: Any, fails: int = 2) -> Brightness:
    return Brightness(accelerator, fails)


def prepare(config: Any, trained: Any) -> None:
    """Needs nothing."""


if __name__ == "__main__":
    from eval import in_training

    in_training.judge, in_training.prepare = judge, prepare
    entry = importlib.import_module(sys.argv[1].removesuffix(".py").replace("/", "."))
    entry.main(sys.argv[2:])
