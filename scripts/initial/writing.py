"""A configuration as text: sections in their order, each key with its reason beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from scripts.initial.choosing import Setting

_COMMENT = 34  # column at which a reason begins, where the value leaves room
_WIDTH = 100


def text(head: Sequence[str], settings: Iterable[Setting]) -> str:
    """YAML with `head` as its comment."""
    tree: dict[str, Any] = {}
    for setting in settings:
        *sections, name = setting.key.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = setting
    lines = [f"# {line}".rstrip() for line in head]
    return "\n".join([*lines, *_lines(tree, 0)]) + "\n"


def values(settings: Iterable[Setting]) -> list[str]:
    """The settings as key=value, as a command takes them."""
    return [f"{one.key}={_plain(one.value)}" for one in settings]


def _lines(tree: dict[str, Any], depth: int) -> list[str]:
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += [f"{'  ' * depth}{name}:", *_lines(value, depth + 1)]
        elif isinstance(value.value, list) and all(isinstance(v, str) for v in value.value):
            found += _listed(name, value, depth)
        else:
            found += _commented(f"{'  ' * depth}{name}: {_plain(value.value)}", value.why, depth)
    return found


def _listed(name: str, setting: Setting, depth: int) -> list[str]:
    short = f"{'  ' * depth}{name}: {_plain(setting.value)}"
    if len(short) <= _WIDTH // 2:
        return _commented(short, setting.why, depth)
    items = [f"{'  ' * (depth + 1)}- {_plain(value)}" for value in setting.value]
    return [*_commented(f"{'  ' * depth}{name}:", setting.why, depth), *items]


def _commented(line: str, why: str, depth: int) -> list[str]:
    if not why:
        return [line]
    beside = f"{line:<{_COMMENT}} # {why}"
    if len(beside) <= _WIDTH:
        return [beside]
    return [f"{'  ' * depth}# {why}"[:_WIDTH], line]


def _plain(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, float):
        return f"{value:.1e}"
    made = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return made.removesuffix("\n").removesuffix("...").strip()
