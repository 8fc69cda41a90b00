"""The pieces of a run's report beside its charts: pictures, times, dataset, use, environment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval.charts import Bar, Share, shapes, shares
from eval.report import THUMBNAIL, Panel, facts, heading, link, listing
from eval.slider import Film, slider
from train import timings as timing
from train import using
from train.run_figures import time_spent
from train.run_record import Run, read_json
from train.screens import duration
from train.using import Way

_PROMPTS, _TIMES = 12, 24  # previews shown: prompts, and steps of each, both evenly spread
_PICTURES, _LARGE = 150, 60  # in the page, so that it stays below 10 MB; of so many large ones
_LONGEST = 512  # pixels of a large one's longer side
_BUCKETS = 12  # that are drawn, of more
_RENAMED = {"sd_atelier": "sd-atelier", "sha256": "SHA-256", "cpus": "CPUs", "gpus": "GPUs"}


def previews(run: Run) -> str:
    """The base's pictures beside those of a step that a slider chooses."""
    folders = sorted(path for path in (run.folder / "previews").glob("step-*") if path.is_dir())
    known = run.setting("preview.prompts")
    prompts = spread(list(enumerate(known if isinstance(known, list) else [])), _PROMPTS)
    count = min(_TIMES, max(2, _PICTURES // max(1, len(prompts)) - 1))
    taken = [path for path in folders if path.name == f"step-{run.taken or 0:08d}"]
    shown = sorted({*spread(folders, count), *taken})
    names = [_step_named(path, best=path in taken) for path in shown]
    films = [
        _film(run, k, str(prompt), list(zip(names, shown, strict=True))) for k, prompt in prompts
    ]
    films = [film for film in films if film.before or any(film.after)]
    pictures = sum(bool(p) for film in films for p in (film.before, *film.after))
    return slider(
        "Previews",
        "The same prompt and the same noise, before training and in its course.",
        names,
        films,
        chosen=shown.index(taken[0]) if taken else -1,
        longest=_LONGEST if pictures <= _LARGE else THUMBNAIL,
    )


def timings(run: Run) -> str:
    parts = time_spent(run)
    total = sum(part.seconds for part in parts)
    recorded = (run.folder / timing.NAME).is_file()
    beside = "what it has recorded beside it" if recorded else "the times of its files"
    said = f"About {duration(total)} in all, by the log and {beside}."
    return shares(
        "Where the time went", said, [Share(p.name, p.seconds, duration(p.seconds)) for p in parts]
    )


def dataset(run: Run) -> str:
    """What was trained on: facts, and the buckets as a chart."""
    values = _of_one_source(run.dataset)
    buckets = values.pop("buckets", None)
    bars = list(_bars(buckets)) if isinstance(buckets, Mapping) else []
    rest = len(buckets) - _BUCKETS if bars else 0
    said = "Pictures in each size that training sees them at" + (
        f"; the {_BUCKETS} largest of {len(buckets or ()):,}." if rest > 0 else "."
    )
    if buckets is not None and not bars:
        values["buckets"] = buckets
    return "".join(
        [
            facts("Dataset", rows(values)),
            *_dataset_links(run),
            shapes("", said, bars) if bars else "",
        ]
    )


def use(run: Run, *, finished: bool) -> str:
    """How the result is used, or how to go on; and what comes next."""
    if not finished:
        return _ways("How to go on", [using.continued(run)])
    evaluated = (run.folder / "eval" / "metrics.json").is_file()
    return _ways("How to use it", [*using.ways(run), None if evaluated else using.measured(run)])


def configuration(run: Run) -> str:
    if not run.config:
        return ""
    count = len(run.config.splitlines())
    return listing(
        "Configuration", f"config.yaml, {count} lines: --config repeats the run", run.config
    )


def evaluation(run: Run) -> str:
    metrics = read_json(run.folder / "eval" / "metrics.json")
    said = str(metrics.get("verdict", ""))
    return link("Evaluation", said, "eval/report.html") if metrics else ""


def environment(run: Run) -> str:
    peaks = [value for value in run.column("peak_memory_gib") if math.isfinite(value)]
    memory = [("Peak memory", f"{max(peaks):.2f} GiB")] if peaks else []
    values = {key: value for key, value in run.manifest.items() if value != []}
    base = values.pop("base", None)
    about = [("Base", _text(base))]
    if isinstance(base, dict):
        about = [(f"Base: {name}", text) for name, text in rows(base)]
    return facts("Environment", [*memory, *rows(values), *(about if base else [])])


def rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts of what a file holds."""
    return [(_named(str(key)), _text(value)) for key, value in values.items()]


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    last = len(items) - 1
    return items if last < count else [items[k * last // (count - 1)] for k in range(count)]


def readable(picture: Path) -> bool:
    """Whether it is there and whole."""
    from PIL import Image

    try:
        with Image.open(picture) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # missing, or torn by a kill
        return False
    return True


def _film(run: Run, k: int, prompt: str, named: Sequence[tuple[str, Path]]) -> Film:
    def panel(label: str, folder: Path) -> Panel | None:
        file = folder / f"{k:02d}.png"
        return Panel(file, label) if readable(file) else None

    before = panel("base", run.folder / "previews" / "base")
    return Film(prompt, before, [panel(label, folder) for label, folder in named])


def _step_named(folder: Path, *, best: bool) -> str:
    number = folder.name[5:].lstrip("0")
    step = f"{int(number):,}" if number.isdecimal() else number
    return f"step {step}{', the best' if best else ''}"


def _of_one_source(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Without the list of sources where there is one, which all the rest is about."""
    values = dict(dataset)
    sources = values.get("sources")
    if isinstance(sources, list) and len(sources) == 1 and isinstance(sources[0], dict):
        del values["sources"]
        values = {"path": sources[0].get("path"), **values}
    return values


def _bars(buckets: Mapping[str, Any]) -> Iterator[Bar]:
    counts = {name: n for name, n in buckets.items() if isinstance(n, int) and n > 0}
    total = sum(counts.values())
    for name, number in sorted(counts.items(), key=lambda one: -one[1])[:_BUCKETS]:
        width, _, height = str(name).partition("x")
        if width.isdecimal() and height.isdecimal() and int(width) * int(height):
            share = f"{100 * number / total:.1f} %"
            yield Bar((int(width), int(height)), str(name), number, share)


def _dataset_links(run: Run) -> Iterator[str]:
    """To the reports of datasets that scripts/prepare.py has written."""
    sources = run.dataset.get("sources")
    paths = [one.get("path") for one in sources or [] if isinstance(one, dict)]
    for path in paths or [run.dataset.get("path")]:
        report = Path(str(path)) / "report.html"
        if path and report.is_file():
            target = os.path.relpath(report.absolute(), run.folder.absolute())
            yield f'<p>Its own report: <a href="{quote(target)}">{escape(target)}</a></p>'


def _ways(title: str, ways: Sequence[Way | None]) -> str:
    shown = [way for way in ways if way]
    if not shown:
        return ""
    return f'<section class="use">{heading(title)}{"".join(map(_way, shown))}</section>'


def _way(way: Way) -> str:
    note = f"<p>{escape(way.note)}</p>" if way.note else ""
    return f"<h3>{escape(way.title)}</h3><pre><code>{escape(way.lines)}</code></pre>{note}"


def _named(key: str) -> str:
    text = _RENAMED.get(key, key.replace("_", " "))
    return text if key in _RENAMED else text[:1].upper() + text[1:]


def _text(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return "none"
    if isinstance(value, Mapping):
        inner = ((str(k).replace("_", " "), _text(v)) for k, v in value.items())
        return ", ".join(f"{name}: {text}" for name, text in inner)
    if isinstance(value, list | tuple):
        return ("; " if any(isinstance(v, Mapping) for v in value) else ", ").join(
            map(_text, value)
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
