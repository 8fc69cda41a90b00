"""What the runs of a sweep are given, checked before any of them starts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from scripts.planning import SCHEMAS
from scripts.sweeping import SweepConfig, SweepRun
from train import screens
from train.config import ROOT, UserError, fields, load


def check(runs: Sequence[SweepRun], extra: Sequence[str]) -> None:
    """Raises UserError where a run would refuse its arguments, as the run itself would say it; of
    entries that are not this project's nothing is known. extra: the arguments of every run that the
    sweep was given."""
    for run in runs:
        method = Path(run.words[0]).stem
        if method not in SCHEMAS or Path(run.words[0]).resolve() != ROOT / f"train/{method}.py":
            return
        words, _ = screens.split(run.words[1:])
        try:
            load(SCHEMAS[method], words, default=ROOT / f"configs/toy/{method}.yaml")
        except UserError as error:
            raise UserError(f"{error}{_own_key(method, extra)}") from None


def _own_key(method: str, extra: Sequence[str]) -> str:
    """That a key may be meant for the sweep itself."""
    known = {name.partition(".")[0] for name, _ in fields(SCHEMAS[method])}
    for key in (word.partition("=")[0] for word in extra):
        near = difflib.get_close_matches(key, SweepConfig.model_fields, n=1)
        if near and "." not in key and key not in known:
            return f"; for '{key}', '{near[0]}' is a key of the sweep itself"
    return ""
