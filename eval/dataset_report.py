"""report.html of a prepared dataset: what is in it, what was left out, and what to look at."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data.checks import many
from data.images import open_image
from data.records import FILE, Record, Table
from eval.charts import Bar, Histogram, heading, histograms, shapes
from eval.report import facts, listing, verdict_line, warning, write_page

_SIDE = 240  # pixels of a thumbnail's longer side
_PAIRS, _REJECTED, _NAMED = 24, 24, 100
_KEPT, _CUT = (40, 190, 140), 0.35  # colour of a crop's outline; brightness of what is cut off
_FILTERS = {
    "smallest": "too small",
    "max_aspect": "too long or too tall",
    "upscale": "smaller than any bucket",
    "duplicates": "showing the same as another",
    "against": "showing the same as one in the held-out set",
    "aesthetic": "low aesthetic score",
    "clip": "unlike their captions",
    "nsfw": "not safe for work",
}
_SCORES = {
    "aesthetic": ("Aesthetic score", "score, about 1 to 10"),
    "clip": ("Likeness of picture and caption", "cosine of CLIP's embeddings"),
    "nsfw": ("Not safe for work", "probability"),
}

Report = Mapping[str, Any]


def write_dataset_report(path: Path, report: Report, table: Table) -> None:
    """Writes the page from report.json's content; `table` has the pictures that could be read.

    Only the pictures that are shown are opened, each at a fraction of its size.
    """
    pictures = _Pictures(report, table)
    write_page(
        path,
        title="Training set",
        pieces=[
            verdict_line(verdict(report)),
            *(warning(each["text"]) for each in report["warnings"]),
            facts("At a glance", list(_glance(report))),
            _buckets(report),
            _contact_sheet(report, pictures),
            _duplicates(report, pictures),
            _left_out(report, pictures),
            _captions(report),
            _scores(report),
            listing("Settings", "what this was made with", _settings(report)),
        ],
    )


def verdict(report: Report) -> str:
    """How many pictures are ready, in how many buckets, and how much there is to look at."""
    counts = report["counts"]
    ready = f"{counts['train']:,} of {many(counts['found'], 'picture')} "
    ready += "is ready" if counts["train"] == 1 else "are ready"
    if report["buckets"]:
        ready += f", in {many(len(report['buckets']), 'bucket')}"
    parts = [ready]
    if counts["held_out"]:
        parts.append(f"{many(counts['held_out'], 'picture', 'is')} held out")
    gone = counts["found"] - counts["kept"]
    if gone:
        parts.append(f"{gone:,} {'was' if gone == 1 else 'were'} left out")
    parts.append(f"{many(len(report['warnings']), 'thing')} to look at")
    return "; ".join(parts) + "."


class _Pictures:
    """Thumbnails by id of the pictures that the page shows."""

    def __init__(self, report: Report, table: Table) -> None:
        wanted = {each["id"] for each in report["contact_sheet"]}
        for group in report["duplicates"]["groups"][:_PAIRS]:
            wanted |= {group["kept"], *(copy["id"] for copy in group["copies"])}
        for rows in report["removed"].values():
            wanted |= {row["id"] for row in rows[:_REJECTED]}
        self._table = table
        ids = table.column("id")
        self._places = {name: k for k, name in enumerate(ids) if name in wanted}

    def record(self, name: str) -> Record:
        return self._table[self._places[name]]

    def thumbnail(self, name: str, boxes: Sequence[Sequence[float]] = ()) -> str:
        """An <img>; of `boxes`, in shares of the sides, what is in none is dimmed."""
        return _tag(_small(io.BytesIO(self.record(name).read())), boxes, name)


def _small(file: Any) -> Image.Image:
    image = open_image(file, cover=(_SIDE // 2, _SIDE // 2))
    image.thumbnail((_SIDE, _SIDE))
    return image


def _tag(image: Image.Image, boxes: Sequence[Sequence[float]], name: str) -> str:
    if boxes:
        image = _with_boxes(image, boxes)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{source}" width="{image.width}" '
        f'height="{image.height}" loading="lazy" alt="{escape(name)}">'
    )


def _with_boxes(image: Image.Image, boxes: Sequence[Sequence[float]]) -> Image.Image:
    width, height = image.size
    result = image.point(lambda level: int(level * _CUT))
    draw = ImageDraw.Draw(result)
    corners = [
        (round(x * width), round(y * height), round(right * width), round(bottom * height))
        for x, y, right, bottom in boxes
    ]
    for box in corners:
        result.paste(image.crop(box), box[:2])
    for left, top, right, bottom in corners:
        draw.rectangle(
            (left, top, max(right - 1, left), max(bottom - 1, top)), outline=_KEPT, width=2
        )
    return result


# Pieces --------------------------------------------------------------------------------------


def _glance(report: Report) -> Iterator[tuple[str, str]]:
    counts, settings = report["counts"], report["settings"]
    yield "Source", settings["source"]
    yield "Recognised as", report["recognised"]
    yield "To train on", _share(counts["train"], counts["found"])
    if settings["held_out"]:
        yield "Held out", _share(counts["held_out"], counts["found"])
    if counts["rejected"]:
        yield "Cannot be used", _share(counts["rejected"], counts["found"])
    for by, number in counts["removed"].items():
        yield "Left out", f"{number:,} {_FILTERS[by]} ({by})"
    for odd in report["oddities"].values():
        names = ", ".join(odd["ids"][:5]) + (" and others" if odd["pictures"] > 5 else "")
        yield "Read with care", f"{odd['pictures']:,} {odd['meaning']}: {names}"
    for note in report["notes"]:
        yield "Note", note


def _share(number: int, total: int) -> str:
    return f"{many(number, 'picture')}, {100 * number / max(total, 1):.3g} %"


def _buckets(report: Report) -> str:
    geometry, settings = report["geometry"], report["settings"]
    text = (
        f"Each picture is scaled to cover its bucket, and what stands out is cut off: "
        f"{100 * geometry['cropped']:.2g} % of the pixels on average. An epoch has "
        f"{geometry['batches']:,} batches of {settings['batch_size']}, of which "
        f"{geometry['short_batches']:,} are not full."
    )
    bars = [
        Bar(
            (row["width"], row["height"]),
            f"{row['width']} x {row['height']}",
            row["images"],
            f"{100 * row['cropped']:.2g} % cut off"
            + (f", {row['enlarged']:,} enlarged" if row["enlarged"] else ""),
        )
        for row in report["buckets"]
    ]
    return shapes("Buckets", text, bars)


def _contact_sheet(report: Report, pictures: _Pictures) -> str:
    if not report["contact_sheet"]:
        return ""
    crop = report["settings"]["crop"]
    several = ", each of the random crops" if crop == "random" else ""
    figures = "".join(
        f"<figure>{pictures.thumbnail(each['id'], each['boxes'])}<figcaption>{escape(each['id'])}"
        f"<small>{each['size'][0]} x {each['size'][1]} to {each['bucket'][0]} x "
        f"{each['bucket'][1]}, {100 * each['cropped']:.2g} % cut off</small>"
        f'<small class="clamp">{escape(each["caption"])}</small></figcaption></figure>'
        for each in report["contact_sheet"]
    )
    explanation = (
        f"What training sees lies inside the line{several}; the dark part is cut off. First the "
        "pictures that lose most, then some of every bucket."
    )
    return f'{heading("Crops", explanation)}<div class="sheet">{figures}</div>'


def _duplicates(report: Report, pictures: _Pictures) -> str:
    duplicates = report["duplicates"]
    if not duplicates["groups"]:
        return ""
    removed = report["settings"]["duplicates"] == "remove"
    fate = "The first of each row was kept" if removed else "Nothing was left out"
    mirrored = duplicates["mirrored"]
    text = f"{many(duplicates['copies'], 'picture', 'shows')} the same as a better one"
    text += f", {mirrored:,} of them mirrored. " if mirrored else ". "
    groups = duplicates["groups"]
    if len(groups) > _PAIRS:
        text += f"{_PAIRS} of {len(groups):,} groups are shown; report.json has all. "
    rows = "".join(_group(group, pictures) for group in groups[:_PAIRS])
    return f'{heading("Duplicates", text + fate + ".")}<div class="cards">{rows}</div>'


def _group(group: Mapping[str, Any], pictures: _Pictures) -> str:
    kept, copies = group["kept"], group["copies"]
    figures = _figure(kept, "kept", pictures)
    for copy in copies[:3]:
        alike = "the same file" if copy["exact"] else f"{copy['distance']} of 64 bits apart"
        mirrored = ", mirrored" if copy["mirrored"] else ""
        fate = "left out" if copy["removed"] else "found"
        figures += _figure(copy["id"], f"{fate}: {alike}{mirrored}", pictures)
    more = f"<small>and {len(copies) - 3:,} more</small>" if len(copies) > 3 else ""
    return f'<article><div class="row pair">{figures}</div>{more}</article>'


def _figure(name: str, label: str, pictures: _Pictures) -> str:
    record = pictures.record(name)
    return (
        f"<figure>{pictures.thumbnail(name)}<figcaption>{escape(name)}"
        f"<small>{escape(label)}</small><small>{record.width} x {record.height}</small>"
        f'<small class="clamp">{escape(record.captions[0])}</small></figcaption></figure>'
    )


def _left_out(report: Report, pictures: _Pictures) -> str:
    pieces = []
    if report["rejected"]:
        rows = "".join(
            _reason(bad["id"], bad["reason"], _thumbnail_of_file(bad["location"], bad["id"]))
            for bad in report["rejected"][:_REJECTED]
        )
        rows += "".join(
            _reason(bad["id"], bad["reason"]) for bad in report["rejected"][_REJECTED:_NAMED]
        )
        text = "These files cannot be used as they are. Nothing was changed in the source."
        pieces.append(f'{heading("Cannot be used", text)}<div class="reasons">{rows}</div>')
        pieces.append(_and_more(len(report["rejected"])))
    for by, removed in report["removed"].items():
        if by != "duplicates":
            pieces.append(_removed(by, removed, pictures))
    return "".join(pieces)


def _removed(by: str, removed: Sequence[Mapping[str, str]], pictures: _Pictures) -> str:
    rows = "".join(
        _reason(row["id"], row["reason"], pictures.thumbnail(row["id"]))
        for row in removed[:_REJECTED]
    )
    rows += "".join(_reason(row["id"], row["reason"]) for row in removed[_REJECTED:_NAMED])
    summary = f"{many(len(removed), 'picture')} {_FILTERS[by]} ({by})"
    return (
        f"{heading(f'Left out: {_FILTERS[by]}')}<details open><summary>{escape(summary)}</summary>"
        f'<div class="reasons">{rows}</div>{_and_more(len(removed))}</details>'
    )


def _and_more(count: int) -> str:
    if count <= _NAMED:
        return ""
    return f"<p><small>and {count - _NAMED:,} more, in report.json</small></p>"


def _reason(name: str, reason: str, picture: str = "") -> str:
    plain = "" if picture else ' class="plain"'
    text = f"<div><b>{escape(name)}</b><small>{escape(reason)}</small></div>"
    return f"<div{plain}>{picture}{text}</div>"


def _thumbnail_of_file(location: str, name: str) -> str:
    """Nothing for what cannot be decoded: that is why most of these are here."""
    path = Path(location.removeprefix(FILE))
    try:
        if location.startswith(FILE) and path.is_file():
            return _tag(_small(path), (), name)
    except Exception:  # a damaged file can raise nearly anything in a decoder
        pass
    return ""


def _captions(report: Report) -> str:
    captions, limit = report["captions"], report["settings"]["max_tokens"]
    if not captions["captions"]:
        return ""
    lengths = {int(length): number for length, number in captions["lengths"].items()}
    how = "counted" if captions["exact"] else "estimated by words (a lower bound; set tokenizer=)"
    pieces = [
        histograms(
            "Captions",
            f"{captions['captions']:,} captions, {captions['different']:,} of them different. "
            f"Tokens are {how}; the line is at {limit}, beyond which nothing is read.",
            [_length_histogram(lengths, limit)],
        )
    ]
    if captions["longest_cut"]:
        rows = "".join(
            _reason(f"{cut['id']}: {cut['tokens']} tokens", cut["caption"])
            for cut in captions["longest_cut"]
        )
        pieces.append(_unfolding(f"{captions['cut']:,} longer than {limit} tokens", rows))
    if captions["repeated"]:
        rows = "".join(_reason(text, f"{number:,} times") for text, number in captions["repeated"])
        pieces.append(_unfolding("captions that are used more than once", rows))
    words = "".join(
        f"<span>{escape(word)}<small>{number:,}</small></span>"
        for word, number in captions["commonest"]
    )
    commonest = heading(f"Commonest {captions['unit']}")
    pieces.append(f'{commonest}<div class="words">{words}</div>')
    return "".join(pieces)


def _unfolding(summary: str, rows: str) -> str:
    return (
        f'<details><summary>{escape(summary)}</summary><div class="reasons">{rows}</div></details>'
    )


def _length_histogram(lengths: Mapping[int, int], limit: int) -> Histogram:
    end = min(max(max(lengths), limit), 3 * limit) + 1
    step = max(1, -(-end // 40))
    counts = [0] * -(-end // step)
    for length, number in lengths.items():
        counts[min(length // step, len(counts) - 1)] += number
    edges = [float(step * k) for k in range(len(counts) + 1)]
    beyond = ", the last bar: and more" if max(lengths) >= edges[-1] else ""
    return Histogram("Length", "captions", f"tokens{beyond}", edges, counts, limit)


def _scores(report: Report) -> str:
    drawn = [
        Histogram(
            _SCORES[name][0],
            "pictures",
            _SCORES[name][1],
            score["edges"],
            score["pictures"],
            score["limit"],
        )
        for name, score in report["scores"].items()
    ]
    return histograms("Scores", "The dashed line is the limit, where one is set.", drawn)


def _settings(report: Report) -> str:
    return json.dumps(report["settings"], indent=1, ensure_ascii=False)
