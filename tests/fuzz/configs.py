"""Configuration files and overrides: they make a configuration, or UserError says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from eval.compare import CompareConfig
from eval.folders import FoldersConfig
from scripts.generate import GenerateConfig
from scripts.prepare_config import PrepareConfig
from tests.fuzz.mutations import ODD_BYTES, nested, odd, odd_texts, spoilt, values
from tests.fuzz.watch import outcome
from train.config import (
    ROOT,
    DreamBoothRun,
    FullRun,
    LoraRun,
    Section,
    TextualInversionRun,
    dump,
    fields,
    load,
)

RUNS: dict[str, type[Section]] = {
    "lora": LoraRun,
    "dreambooth": DreamBoothRun,
    "full": FullRun,
    "textual_inversion": TextualInversionRun,
}
OTHERS: list[type[Section]] = [GenerateConfig, PrepareConfig, CompareConfig, FoldersConfig]
# Aliases that would be billions of values, one that holds itself, and depths.
BOMBS = [
    b"\n".join(
        [b"a0: &a0 [x, x]"]
        + [b"a%d: &a%d [%s]" % (k, k, b", ".join([b"*a%d" % (k - 1)] * 9)) for k in range(1, 12)]
    ),
    b"data: &a [*a]",
    b"data: &a {path: *a}",
    b"seed: 1\n" + b"data: " + nested(3000),
    b"{" * 3000,
    b"- " * 3000,
    b"? " * 3000,
    b"seed: !!python/object/apply:os.system [touch /tmp/canary]",
    b"seed: !!int 0x",
    b"seed: !!float x",
    b"seed: 2001-99-99",
    b"seed: 0b",
    b"seed: _",
    b"seed: 0o9",
    b"[1]: 2",
    b"? {a: b}\n: c",
    b"a: 1\n--- \nb: 2",
    "seed: 1".encode("utf-16"),
]


@dataclass(frozen=True)
class Example:
    schema: type[Section]
    file: bytes | None
    overrides: list[str]


@cache
def shipped() -> list[tuple[type[Section], dict[str, Any]]]:
    """The configurations of the repository with the kind that each is."""
    files = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "toy").glob("*.yaml")]
    return [
        (RUNS[file.stem], yaml.safe_load(file.read_text(encoding="utf-8")))
        for file in sorted(files)
        if file.stem in RUNS
    ]


@cache
def keys_of(schema: type[Section]) -> list[str]:
    return [name.replace("[]", ".0") for name, _ in fields(schema)]


@st.composite
def overrides(draw: st.DrawFn, schema: type[Section]) -> str:
    """key=value as somebody may type it."""
    key = draw(st.sampled_from(keys_of(schema)))
    match draw(st.integers(0, 7)):
        case 0:
            key = draw(odd_texts)
        case 1:
            key = key + draw(st.sampled_from([".", ".x", ".0", "..", "x", ".path", "[]"]))
        case 2:
            key = key[1:]
    value = draw(values)
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    return f"{key}={text.strip()}"


@st.composite
def examples(draw: st.DrawFn) -> Example:
    schema, content = draw(st.sampled_from(shipped()))
    file: bytes | None
    match draw(st.integers(0, 7)):
        case 0:
            file = draw(st.sampled_from(BOMBS))
        case 1:
            schema, file = draw(st.sampled_from(OTHERS)), None
        case _:
            names = [name.rpartition(".")[2] for name in keys_of(schema)]
            text = yaml.safe_dump(draw(odd(content, names)), allow_unicode=True)
            file = draw(spoilt(text.encode("utf-8", "surrogatepass")))
    if file is not None and draw(st.integers(0, 9)) == 0:
        file += b"\n" + draw(ODD_BYTES)
    return Example(schema, file, draw(st.lists(overrides(schema), max_size=3)))


def check(example: Example, folder: Path) -> None:
    """The property. What can be read is written as YAML that reads back the same."""
    arguments = list(example.overrides)
    if example.file is not None:
        (folder / "config.yaml").write_bytes(example.file)
        arguments.insert(0, f"--config={folder / 'config.yaml'}")
    config = outcome(lambda: load(example.schema, arguments))
    if config is not None:
        (folder / "again.yaml").write_text(dump(config), encoding="utf-8")
        assert load(example.schema, [f"--config={folder / 'again.yaml'}"]) == config
