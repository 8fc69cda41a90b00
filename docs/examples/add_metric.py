"""A metric in one file: how colourful the pictures are (Hasler & Süsstrunk 2003, equation 13).

    accelerate launch docs/examples/add_metric.py run=runs/toy-lora

evaluates as eval/evaluate.py does, whose arguments it takes, with one row more in the table, the
report and metrics.json: base and fine-tuned with their intervals, and the paired change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from eval import evaluate
from train.config import command

if TYPE_CHECKING:
    from eval.measuring import Evidence
    from eval.scores import Score


def colourfulness(pixels: np.ndarray) -> float:
    """Of a picture (H, W, 3), uint8: 0 is grey, 109 was "extremely colourful" to viewers."""
    red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])  # (2, H, W)
    spread = np.hypot(*opponents.std(axis=(1, 2)))
    return float(spread + 0.3 * np.hypot(*opponents.mean(axis=(1, 2))))


def score(found: Evidence) -> Mapping[str, Score]:
    """One number for each picture of each arm; `of_pictures` makes intervals and change of them."""
    from eval.features import read_rgb
    from eval.prompt_scores import of_pictures
    from eval.scores import MAIN

    values = {
        arm: np.array([colourfulness(read_rgb(path)) for path in found.made[arm]])
        for arm in MAIN
        if arm in found.made
    }
    return {
        "colourfulness": of_pictures(
            values,
            found.groups,
            title="Colourfulness",
            better=None,  # a style may want more of it or less
            how="Spread and mean of the opponent colours (Hasler & Süsstrunk 2003).",
            against=found.against,
        )
    }


def main(arguments: list[str]) -> None:
    from eval import measuring

    measuring.OTHERS.append(score)
    evaluate.main(arguments)


if __name__ == "__main__":
    command(main)
