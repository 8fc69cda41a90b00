"""Scores over the checkpoints of a run, from what was evaluated during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def of_checkpoints(folder: Path) -> list[dict[str, Any]]:
    """The scores of every step that was evaluated, ascending; unreadable files are left out."""
    from train.examination import read

    return [
        {"step": one.step, "scores": {k: v for k, v in one.scores.items() if v == v}}
        for one in read(folder)
    ]
