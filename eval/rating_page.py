"""A page on which people judge pictures without knowing whose they are, and the key to it.

One HTML file that works from a disk, with all pictures in it. What it shows of a picture is its
prompt: order and sides are shuffled, names and files are in the key alone. Votes stay in the
browser until they are saved as a JSON file, which eval/votes.py reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from data.counter import generator
from data.files import write_atomically
from eval.evaluated_runs import Shape, Side, matched, parsed
from eval.rating_assets import PAGE, SCRIPT, STYLE
from train.config import UserError

FORMAT = 1  # of the key and of the votes
Kind = Literal["pair", "score"]
QUESTIONS = {
    "pair": "Which picture shows this better?",
    "score": "How well does the picture show this? 1 is not at all, 5 is perfectly.",
}


class _Item(Shape):
    prompt: str
    seed: int
    sides: list[int]
    sha256: list[str]


class _Key(Shape):
    page: str
    kind: Kind
    names: list[str]
    items: list[_Item]

    @model_validator(mode="after")
    def _sides_are_there(self) -> Self:
        shown = 2 if self.kind == "pair" else 1
        if shown == 2 and len(self.names) != 2:
            raise ValueError(f"pairs are of two, not of {self.names}")
        for place, item in enumerate(self.items):
            known = sorted(set(item.sides) & set(range(len(self.names))))
            if known != sorted(item.sides) or not len(item.sides) == len(item.sha256) == shown:
                raise ValueError(f"item {place} has no {shown} of the pictures of {self.names}")
        return self


def write(
    file: Path,
    sides: Sequence[Side],
    *,
    kind: Kind = "pair",
    count: int = 40,
    question: str | None = None,
    seed: int = 0,
) -> Path:
    """The page and, beside it, its key FILE.key.json, whose path is returned.

    kind: two pictures of a prompt side by side, or one at a time; count: prompts with a seed, from
    all of them evenly. The same arguments give the same page. Raises UserError where a picture is
    gone, or FILE is the page of other pictures: votes for it could no longer be counted.
    """
    items = plan(sides, kind=kind, count=count, seed=seed)
    shown = [
        {"prompt": item["prompt"], "pictures": [_embedded(path) for path in item["files"]]}
        for item in items
    ]
    asked = question or QUESTIONS[kind]
    payload: dict[str, Any] = {"kind": kind, "question": asked, "items": shown}
    payload["page"] = hashlib.sha256(json.dumps(payload).encode()).hexdigest()
    key = {
        "format": FORMAT,
        "page": payload["page"],
        "kind": kind,
        "question": asked,
        "names": [side.name for side in sides],
        "items": [_keyed(item) for item in items],
    }
    path = key_of(file)
    if path.is_file() and _read(path).get("page") != payload["page"]:
        raise UserError(f"rating={file} is a page of other pictures; choose another name")
    write_atomically(path, (json.dumps(key, indent=1) + "\n").encode())
    write_atomically(file, _page(payload).encode())
    return path


def plan(sides: Sequence[Side], *, kind: Kind, count: int, seed: int) -> list[dict[str, Any]]:
    """What is shown, in its order: prompt, seed, whose pictures (places in `sides`), and files.

    Each side is on the left in half of the pairs.
    """
    everything = matched(sides)
    count = min(count, len(everything))
    chosen = [everything[k * len(everything) // count] for k in range(count)]
    items = [_item(sides, samples) for samples in chosen]
    rng = generator(seed, "rating", *(_hash(file) for item in items for file in item["files"]))
    if kind == "score":
        items = [_only(item, k) for item in items for k in item["sides"]]
    else:
        turned = rng.permutation(len(items)) % 2
        items = [_turned(item) if turn else item for item, turn in zip(items, turned, strict=True)]
    return [items[k] for k in rng.permutation(len(items))]


def read_key(file: Path, sides: Sequence[Side]) -> dict[str, Any]:
    """The key of a page; UserError where it is not there or of other runs or other pictures."""
    path = key_of(file)
    if not path.is_file():
        raise UserError(f"rating={file}: no {path.name} beside it, without which no vote counts")
    key = _read(path)
    names = [side.name for side in sides]
    if key.get("names") != names:
        raise UserError(f"{path} is of {key.get('names')}, not of {names}; name the same, in order")
    samples = [side.samples() for side in sides]
    places = {(sample["prompt"], sample["seed"]): place for place, sample in samples[0].items()}
    for item in key["items"]:
        place = places.get((item["prompt"], item["seed"]))
        files = [sides[k].picture(samples[k][place]) if place else None for k in item["sides"]]
        if [file and _hash(file) for file in files] != item["sha256"]:
            raise UserError(
                f"{path}: the pictures of {item['prompt']!r} are no longer those that were judged; "
                "make a new page, rating=OTHER.html"
            )
    return key


def key_of(file: Path) -> Path:
    return file.with_suffix(".key.json")


def _item(sides: Sequence[Side], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    files = [side.picture(sample) for side, sample in zip(sides, samples, strict=True)]
    for side, sample, file in zip(sides, samples, files, strict=True):
        if file is None:
            picture = side.file.parent / sample["pictures"]["finetuned"]
            raise UserError(f"{picture} is gone; evaluate {side.name} again")
    first = samples[0]
    return {
        "prompt": first["prompt"],
        "seed": first["seed"],
        "sides": list(range(len(sides))),
        "files": files,
    }


def _only(item: Mapping[str, Any], k: int) -> dict[str, Any]:
    return {**item, "sides": [k], "files": [item["files"][k]]}


def _turned(item: Mapping[str, Any]) -> dict[str, Any]:
    return {**item, "sides": item["sides"][::-1], "files": item["files"][::-1]}


def _keyed(item: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: item[name] for name in ("prompt", "seed", "sides")}
    return {**said, "sha256": [_hash(file) for file in item["files"]]}


def _embedded(file: Path) -> str:
    """The pixels alone: whatever else the file says could tell whose it is."""
    from eval.features import read_rgb
    from eval.report import embed

    return embed(read_rgb(file))


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return parsed(path, _Key)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no key of a rating page ({error}); make a new page, rating=OTHER.html"
        ) from None


def _page(payload: Mapping[str, Any]) -> str:
    # `<` would end the element that holds it: `</script>` in a prompt.
    content = json.dumps(payload).replace("<", "\\u003c")
    parts = {
        "script_hash": _csp(SCRIPT),
        "style_hash": _csp(STYLE),
        "style": STYLE,
        "question": escape(payload["question"]),
        "script": SCRIPT,
        "content": content,
    }
    # In one pass: what is put in may hold anything.
    return re.sub(r"\{(\w+)\}", lambda name: parts[name[1]], PAGE)


def _csp(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
