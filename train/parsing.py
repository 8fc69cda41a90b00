"""How a configuration is read: YAML files and `key=value` overrides into a typed `Section`, with
errors that name the right key; and how an entry ends for a user's mistake.

Imports nothing heavy, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from train import screens

ROOT = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """A mistake the user can mend; the message names the file or key, the value and the remedy."""


class RunFailed(RuntimeError):
    """A run that cannot go on, through no mistake in its configuration; the message says what to
    do."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Section)

# Far above any configuration, and far below what would keep the parser busy for minutes.
MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 40
MAX_ALIASES = 1000
MAX_VALUES = 100_000  # with all aliases written out
_PROBLEMS_AT_MOST = 20
_HERE = "the command line"
_SAID_AT_MOST = 300  # characters of a value in a message


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `no` is a word (`mixed_precision: no`), only true and false are not
    (YAML 1.2)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Writes out `<<: *defaults`, of which there can be more than anybody meant."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.YAMLError(f"a mapping has more than {MAX_VALUES} keys")


_Loader.yaml_implicit_resolvers = {
    letter: [pair for pair in resolvers if pair[0] != "tag:yaml.org,2002:bool"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load(schema: type[C], arguments: Sequence[str], *, default: Path | None = None) -> C:
    """Reads `--config FILE` (or the default file) and applies `key=value` overrides.

    Values are YAML (`lora.rank=16`, `preview.prompts='[a cat, a dog]'`), but for single texts and
    paths, which are taken as they stand (`data.caption="a cat: big"`). Raises UserError for an
    unreadable file, an unknown key (naming the nearest) or an invalid value. `--help` prints and
    exits.
    """
    file, overrides = _split(arguments, default)
    if file == "--help":
        print(describe(schema, default))
        raise SystemExit(0)
    values = _read(Path(file)) if file else {}
    texts = {name for name, field in fields(schema) if _holds_text(field.annotation)}
    for override in overrides:
        _apply(values, override, texts)
    given = {override.partition("=")[0] for override in overrides}
    return validate(schema, values, where=file or _HERE, given=given)


def validate(
    schema: type[C], values: dict[str, Any], *, where: str, given: Collection[str] = ()
) -> C:
    """Builds the typed configuration; every problem is listed in one UserError, which names `where`
    the values are from, or the command line if all that is wrong was `given` there."""
    _check_values(values)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        problems = [_explain(schema, dict(problem)) for problem in found[:_PROBLEMS_AT_MOST]]
        if len(found) > len(problems):
            problems.append(f"and {len(found) - len(problems)} more")
        if {".".join(map(str, problem["loc"])) for problem in found} <= set(given):
            where = _HERE
        raise UserError(f"configuration ({where}): " + "; ".join(problems)) from None


def dump(config: Section) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def command(main: Callable[[list[str]], None]) -> None:
    """Runs an entry: exit code 2 for a user's mistake and 1 for a run that cannot go on, each with
    a message on stderr, 130 for Ctrl-C, and no traceback. `screens.FLAGS` are taken out of its
    arguments."""
    _quiet_libraries()
    arguments, way = screens.split(sys.argv[1:])
    try:
        with screens.speaking(way):
            _run(main, arguments)
        _hear_nothing_more()
    except BrokenPipeError:  # whoever was reading has read enough: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # training has a way of its own, train/stopping.py
        with suppress(OSError):
            print(file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _run(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    try:
        main(arguments)
    except (UserError, RunFailed) as error:
        rank, code = os.environ.get("RANK", "0"), 2 if isinstance(error, UserError) else 1
        where = "" if rank == "0" else f" (process {rank})"
        with suppress(OSError):
            print(f"error{where}: {error}", file=sys.stderr)
        screens.event("error", message=str(error), exit_code=code)
        raise SystemExit(code) from None


def _hear_nothing_more() -> None:
    """All is done; a signal while Python closes down would make a failure of it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _quiet_libraries() -> None:
    """No advice about packages this project does not need, printed by others at import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # Loader workers fork; fast tokenizers warn about it at every fork unless told.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _split(arguments: Sequence[str], default: Path | None) -> tuple[str | None, list[str]]:
    files: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--help", "-h"):
            return "--help", []
        if argument == "--config":
            files.append(next(rest, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif "=" in argument and not argument.startswith("-"):
            overrides.append(argument)
        else:
            raise UserError(f"unexpected argument {argument!r}; use --config FILE and key=value")
    if "" in files:
        raise UserError("--config needs a file: --config configs/lora.yaml")
    if len(files) > 1:
        raise UserError(f"--config is given twice ({', '.join(files)}): give one, and key=value")
    return files[0] if files else str(default) if default else None, overrides


def read_yaml(file: Path) -> Any:
    """The value of a YAML file, from anybody. Raises OSError, UnicodeDecodeError or YAMLError."""
    with file.open("rb") as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise yaml.YAMLError(f"it has more than {MAX_FILE_BYTES} bytes")
    return _parsed(content.decode("utf-8-sig"))


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_yaml(file)
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {file} is not valid YAML: {_said(str(error), 2000)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: expected `key: value` lines at the top level")
    return values


def _parsed(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also for what a parser would choke on."""
    depth = aliases = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MAX_DEPTH or aliases > MAX_ALIASES:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels, or {MAX_ALIASES} aliases")
    try:
        return yaml.load(text, _Loader)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What is tagged or looks like a number or a date, and is none.
        raise yaml.YAMLError(f"a value in it cannot be read ({error})") from None


def _check_values(values: dict[str, Any]) -> None:
    """Raises UserError for more values than any configuration has, and texts that are none."""
    rest: list[tuple[str, Any]] = [("", values)]
    count = 0
    while rest:
        key, value = rest.pop()
        count += 1
        if count > MAX_VALUES:
            raise UserError(f"the configuration has more than {MAX_VALUES} values, or aliases")
        if isinstance(value, dict):
            rest += [(f"{key}.{name}" if key else str(name), v) for name, v in value.items()]
            rest += [(key, name) for name in value]
        elif isinstance(value, list | tuple | set):
            rest += [(key, item) for item in value]
        elif isinstance(value, str) and (
            "\0" in value or any("\ud800" <= c <= "\udfff" for c in value)
        ):
            raise UserError(f"'{_said(key)}'={_said(ascii(value))}: holds NUL, or is not UTF-8")


def _said(text: str, most: int = _SAID_AT_MOST) -> str:
    """A key or a value as it can stand in a message."""
    plain = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[: most + 1])
    return plain if len(text) <= most else f"{plain[:most]}..."


def _holds_text(annotation: Any) -> bool:
    several = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if several else (annotation,)
    return set(kinds) <= {str, Path, type(None)}


def _apply(values: dict[str, Any], override: str, texts: set[str]) -> None:
    key, _, text = override.partition("=")
    value: Any = text
    if key not in texts or text == "null":
        try:
            value = _parsed(text) if text else ""
        except yaml.YAMLError:
            pass  # validation will say what was expected
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


def _explain(schema: type[Section], problem: dict[str, Any]) -> str:
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] not in ("extra_forbidden", "missing"):
        # Of a value that may be of several kinds, pydantic adds the kind it tried.
        while len(parts) > 1 and not (parts[-1].isdigit() or _is_key(schema, ".".join(parts))):
            parts.pop()
    key = ".".join(parts)
    shown, value = _said(key), _said(repr(problem["input"]))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{shown}'{_nearest(schema, _numberless(key))}"
    if problem["type"] == "missing":
        below = [name for name, _ in fields(schema) if name.startswith(f"{key}.")]
        asked = f"{key}.path" if f"{key}.path" in below else (below or [key])[0]
        return f"'{shown}' is required: add {asked}=..."
    if problem["type"] == "value_error":
        return _said(str(problem["ctx"]["error"]), 2000)
    if problem["type"] in ("list_type", "tuple_type"):
        return f"'{shown}'={value}: give a list: {shown}='[..., ...]'"
    if problem["type"] in ("model_type", "model_attributes_type"):
        below = [name for name, _ in fields(schema) if name.startswith(f"{key}.")]
        return f"'{shown}'={value}: it is a section; set its keys: {', '.join(below)}"
    return f"'{shown}'={value}: {_said(problem['msg'])}"


def _numberless(key: str) -> str:
    """`sources.0.path` as `fields` has it: `sources[].path`."""
    return re.sub(r"[.][0-9]+(?=[.])", "[]", key)


def _is_key(schema: type[Section], key: str) -> bool:
    known = [name for name, _ in fields(schema)]
    name = _numberless(key)
    return name in known or any(other.startswith(f"{name}.") for other in known)


def _nearest(schema: type[Section], key: str) -> str:
    known = [name for name, _ in fields(schema)]
    sections = dict.fromkeys(name.partition(".")[0] for name in known if "." in name)
    if "." not in key and (near := difflib.get_close_matches(key, sections, n=1)):
        return f"; did you mean '{near[0]}'?"
    section, _, leaf = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    for near in (siblings, known):  # a key of that name elsewhere is meant sooner than no key
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(near)}
        if matches := difflib.get_close_matches(leaf, by_leaf, n=1):
            found = by_leaf[matches[0]]
            if near is siblings or "[]" not in section:
                return f"; did you mean '{found}'?"
    return f"; known there: {', '.join(siblings)}" if siblings else ""


def fields(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a configuration with their pydantic field; `sources[].path` is a key of
    each item of a list."""
    for name, field in schema.model_fields.items():
        section, item = _section(field.annotation)
        if section is not field.annotation:
            yield f"{prefix}{name}", field
        if section is not None:
            yield from fields(section, f"{prefix}{name}{item}.")


def _section(annotation: Any) -> tuple[type[Section] | None, str]:
    """The section a field holds, and "[]" where it holds a list of them."""
    if get_origin(annotation) is list:
        return _section(get_args(annotation)[0])[0], "[]"
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
    return (found[0] if found else None), ""


def describe(schema: type[Section], default: Path | None) -> str:
    """The text of --help: every key, its default and its meaning."""
    lines = [
        (schema.__doc__ or "").strip(),
        "",
        "usage: [accelerate launch] ENTRY [--config FILE] [key=value ...]",
    ]
    if default:
        lines.append(f"without --config: {os.path.relpath(default)}")
    lines.append("")
    for name, field in fields(schema):
        value = "required" if field.is_required() else field.default
        lines.append(f"  {name}  ({value}){_listed(field.annotation)}")
        lines.append(f"      {' '.join((field.description or '').split())}")
    lines += ["", *(f"  {flag}\n      {text}" for flag, text in screens.FLAGS.items())]
    return "\n".join(lines)


def _listed(annotation: Any) -> str:
    known = choices(annotation)
    return f": {', '.join(map(str, known))}" if known else ""


def choices(annotation: Any) -> tuple[Any, ...]:
    """What a key may be set to, where that is a matter of a few words."""
    while get_origin(annotation) in (list, Union, UnionType):
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()
