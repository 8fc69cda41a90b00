"""Writes docs/configuration.md: every key of every command, from the code.

    python scripts/reference.py

What a key means, its default and its choices stand beside it in the code, as --help prints them. A
test writes the page anew and compares.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from train import screens
from train.config import (
    ROOT,
    DreamBoothRun,
    FullRun,
    LoraRun,
    Section,
    TextualInversionRun,
    command,
    fields,
    load,
    read_yaml,
)

METHODS: dict[str, type[Section]] = {
    "lora": LoraRun,
    "dreambooth": DreamBoothRun,
    "textual_inversion": TextualInversionRun,
    "full": FullRun,
}
_HEAD = """# Every key

*Written by `python scripts/reference.py` from the code; a test holds it equal.*

All commands take `--config FILE` and `key=value`: `train.steps=500`,
`preview.prompts='[a cat, a dog]'`. A value is YAML; `null` is none. `--help` of each command prints
its own keys. A mistyped key is refused, and the nearest named.

- [Training](#training): {sections}
- [The other commands](#the-other-commands): {commands}

## Training

The keys of `train/lora.py`, `train/dreambooth.py`, `train/textual_inversion.py` and
`train/full.py`. The default is the code's; below it what [configs](../configs)`/METHOD.yaml`, for
Stable Diffusion 2.1 at 768 px, sets instead.
"""


class ReferenceConfig(Section):
    """The reference of all keys (scripts/reference.py)."""

    output: Path = ROOT / "docs/configuration.md"
    """The page that is written."""


class Key(NamedTuple):
    """One key as the page has it."""

    name: str
    field: Any
    methods: tuple[str, ...]
    """The methods that have it; empty for keys of the other commands."""


def main(arguments: list[str]) -> None:
    config = load(ReferenceConfig, arguments)
    config.output.write_text(page(), encoding="utf-8")
    print(f"wrote {config.output}")
    screens.done(config.output)


def page() -> str:
    """The whole page, as Markdown."""
    training, others = sections(), commands()
    head = _HEAD.format(
        sections=_links(training),
        commands=_links(name for name, _ in others),
    )
    lines = [head]
    for name, keys in training.items():
        lines += [f"### {name}", "", *_note(name, keys), *_table(keys, shipped()), ""]
    lines += ["## The other commands", ""]
    for name, schema in others:
        keys = [Key(key, field, ()) for key, field in fields(schema)]
        lines += [f"### {name}", "", _summary(schema), "", *_table(keys, {}), ""]
    return "\n".join(lines).rstrip() + "\n"


def sections() -> dict[str, list[Key]]:
    """The keys of training by section, those at the top first."""
    found: dict[str, Key] = {}
    for method, schema in METHODS.items():
        for name, field in fields(schema):
            before = found.get(name)
            methods = (*before.methods, method) if before else (method,)
            found[name] = Key(name, before.field if before else field, methods)
    top = {name.partition(".")[0] for name in found if "." in name}
    grouped: dict[str, list[Key]] = {"top level": []}
    for name, key in found.items():
        section = name.partition(".")[0].removesuffix("[]")
        grouped.setdefault(section if section in top else "top level", []).append(key)
    return grouped


def commands() -> list[tuple[str, type[Section]]]:
    """(what is typed, its configuration) of every other command. A configuration names its
    command in its docstring."""
    found = []
    for folder in ("eval", "scripts"):
        for file in sorted((ROOT / folder).glob("*.py")):
            if '__name__ == "__main__"' in file.read_text("utf-8"):
                found += [(_typed(c, f"{folder}/{file.name}"), c) for c in schemas(file)]
    return found


def schemas(file: Path) -> list[type[Section]]:
    """The configurations of one entry, in its order."""
    entry = file.relative_to(ROOT).as_posix()
    ours = file.samefile(__file__)  # imported a second time, pydantic finds no docstrings in it
    name = __name__ if ours else entry.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    if entry == "eval/evaluate.py":  # a run's keys, but for two folders
        from eval.folders import FoldersConfig

        return [FoldersConfig]
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return [k for k in kinds if issubclass(k, Section) and entry in (k.__doc__ or "")]


def shipped() -> dict[str, dict[str, Any]]:
    """By method, what its file in configs/ sets, with dotted keys."""
    return {method: dict(_flat(read_yaml(ROOT / f"configs/{method}.yaml"))) for method in METHODS}


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _typed(schema: type[Section], entry: str) -> str:
    """`scripts/cache.py verify` of "... (scripts/cache.py verify cache=DIR)"."""
    shown = re.search(rf"{re.escape(entry)}((?: [a-z_-]+)?)(?![=\w])", schema.__doc__ or "")
    return entry + (shown[1] if shown else "")


def _summary(schema: type[Section]) -> str:
    return _plain(
        re.sub(r"\s*\((?:scripts|eval)/[^)]*\)", "", " ".join((schema.__doc__ or "").split()))
    )


def _note(section: str, keys: list[Key]) -> list[str]:
    methods = set().union(*(key.methods for key in keys))
    if methods == METHODS.keys():
        return []
    return [
        f"Of {', '.join(f'`train/{method}.py`' for method in METHODS if method in methods)}.",
        "",
    ]


def _table(keys: Iterable[Key], set_by: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| key | is | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        meaning = " ".join((key.field.description or "").split())
        default = (
            "**required**"
            if key.field.is_required()
            else _value(key.field.get_default(call_default_factory=True))
        )
        cells = [f"`{key.name}`", kind(key.field), default + _set(key, set_by), _plain(meaning)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _set(key: Key, set_by: dict[str, dict[str, Any]]) -> str:
    """What the shipped configurations have in place of the default."""
    unset = None if key.field.is_required() else key.field.get_default(call_default_factory=True)
    found: dict[str, list[str]] = {}
    for method, values in set_by.items():
        if key.name in values and values[key.name] != unset:
            found.setdefault(_value(values[key.name]), []).append(method)
    return "".join(f"<br>{', '.join(methods)}: {value}" for value, methods in found.items())


def kind(field: Any) -> str:
    """What a key may be set to, in words."""
    return _kind(field.annotation) + _limits(field)


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if each is NoneType else _kind(each) for each in inner)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is list:
        return "list of sections" if _is_section(inner[0]) else f"list of {_kind(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} of {_kind(inner[0])}"
    if origin is dict:
        return f"{_kind(inner[0])}: {_kind(inner[1])}"
    if _is_section(annotation):
        return "section"
    names = {
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        str: "text",
        Path: "path",
    }
    return names.get(annotation, getattr(annotation, "__name__", "any"))


def _limits(field: Any) -> str:
    words = {
        "ge": "at least",
        "gt": "above",
        "le": "at most",
        "lt": "below",
        "multiple_of": "a multiple of",
    }
    said = [
        f"{word} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, word in words.items()
        if getattr(limit, name, None) is not None
    ]
    return f", {', '.join(said)}" if said else ""


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _value(value: Any) -> str:
    """A default as it would be typed; what is long is left to the file."""
    if value is None or isinstance(value, Section):
        return "none" if value is None else "as below"
    if isinstance(value, Path):
        value = value.relative_to(ROOT).as_posix() if value.is_relative_to(ROOT) else str(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        text = f"{value:g}"
    if isinstance(value, list) and len(text) > 40:
        return f"a list of {len(value)}"
    return f"`{text}`".replace("|", r"\|") if text else "empty"


def _plain(text: str) -> str:
    """A sentence that stays one in a table: no HTML, no emphasis, no column."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    plain = [p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in parts]
    return "".join(plain)


def _links(names: Iterable[str]) -> str:
    return ", ".join(f"[{name}](#{anchor(name)})" for name in names)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.lower())
    return words.replace(" ", "-")


if __name__ == "__main__":
    command(main)
