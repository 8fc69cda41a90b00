"""Overrides of a run on a real base and real pictures: `dry_run=true` says the plan, or UserError
what is wrong with it, before anything is loaded."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from hypothesis import strategies as st

from tests.fuzz.mutations import FLOATS, TEXTS, values
from tests.fuzz.watch import outcome
from tests.runs import arguments, make_world
from train import lora
from train.config import LoraRun, fields

# Where files are read from and written to, which the world decides; and what asks the network.
FIXED = ("path", "output", "cache", "dry_run", "revision", "config", "image_column", "trackers")
NUMBERS = [0, 1, 2, 3, 7, 8, 16, 33, 64, 1000, 10**6, 2**31, 2**63, 10**30]


@dataclass(frozen=True)
class Example:
    overrides: list[str]


@cache
def keys() -> dict[str, Any]:
    """Those that may be anything, with what they hold."""
    return {
        name: field.annotation
        for name, field in fields(LoraRun)
        if "[]" not in name and name.rpartition(".")[2] not in FIXED
    }


@st.composite
def examples(draw: st.DrawFn) -> Example:
    chosen = draw(st.lists(st.sampled_from(sorted(keys())), max_size=4, unique=True))
    return Example([f"{key}={_text(draw, key)}" for key in chosen])


def _text(draw: st.DrawFn, key: str) -> str:
    """Mostly of the kind that the key holds."""
    kind = keys()[key]
    words = [str(word) for part in (kind, *get_args(kind)) for word in _words(part)]
    kinds = [st.sampled_from(NUMBERS), st.sampled_from(FLOATS), st.booleans()]
    texts = st.sampled_from([text for text in TEXTS if "/" not in text])
    value = draw(st.one_of(*kinds, values, texts, *([st.sampled_from(words)] * 4 if words else [])))
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _words(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def check(example: Example, folder: Path) -> None:
    """The property."""
    if not (folder / "base").exists():
        make_world(folder, pictures=4)
    fixed = [f"output={folder / 'run'}", "dry_run=true", "tracking.trackers=[]"]
    run = arguments(folder, folder / "run", *example.overrides, *fixed)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        outcome(lambda: lora.main(run))
    said.getvalue().encode()
    assert not (folder / "run").exists()
