"""An evaluation's metrics as a table for the terminal and as the content of report.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_score import CONVENTION
from eval.figures import number, signed
from eval.report import Comparison, Panel, Section, Table, write_report

_SHOWN = 12  # comparisons spread evenly over all prompts
_WORST = 4

Nearest = Callable[[dict[str, Any]], np.ndarray]  # sample -> its held-out picture (H, W, 3)


def present(metrics: dict[str, Any], folder: Path, nearest: Nearest) -> None:
    """Write folder/report.html from the metrics and the pictures in the folder."""
    samples = metrics["samples"]
    of_prompts = _first_of_each_prompt(samples)
    evenly = _evenly(of_prompts)
    fallen = [sample for sample in sorted(samples, key=_gain) if _gain(sample) < 0][:_WORST]
    write_report(
        folder / "report.html",
        title=f"Evaluation of {folder.absolute().parent.name}",
        verdict=metrics["verdict"],
        table=score_table(metrics),
        warnings=metrics["warnings"],
        sections=[
            Section(
                "Side by side",
                f"{len(evenly)} of {len(of_prompts)} prompts, evenly spaced, not picked. "
                "Both models got the same noise.",
                [_compare(sample, folder, nearest) for sample in evenly],
            ),
            Section(
                "Largest falls in CLIP score",
                "Where the fine-tuned model follows the prompt least, against the base.",
                [_compare(sample, folder, nearest) for sample in fallen],
            ),
        ],
        method=method(metrics),
    )


def score_table(metrics: dict[str, Any]) -> Table:
    """Base, fine-tuned and change, with intervals."""
    fid, clip = metrics["fid"], metrics["clip_score"]
    rows = [
        (name, [_cell(fid[key], "value"), _cell(clip[key], "mean")])
        for name, key in (("base", "base"), ("fine-tuned", "finetuned"))
    ]
    rows.append(("change", [_change(fid, "value"), _change(clip, "mean")]))
    return Table(["FID (less is better)", "CLIP score (more is better)"], rows)


def console(table: Table) -> str:
    """The table in aligned columns, small print in brackets."""
    lines = [["", *table.columns]]
    for name, cells in table.rows:
        lines.append([name, *(f"{value}  [{note}]" for value, note in cells)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def method(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """How each number came about, for a reader who wants to repeat or doubt it."""
    fid, clip, how = metrics["fid"], metrics["clip_score"], metrics["settings"]
    extractor, samples = metrics["extractor"], metrics["samples"]
    scheduler = how["scheduler"]
    return [
        (
            "FID",
            f"Fréchet distance (float64) of CLIP image embeddings, {fid['dimension']} dimensions, "
            f"{fid['pictures']} generated against {fid['references']} held-out pictures. Not "
            "comparable with numbers from Inception features. Two independent sets of these "
            f"sizes from one distribution would score about {number(fid['bias_estimate'])}.",
        ),
        ("FID interval", f"{fid['interval']}, {fid['resamples']} resamples, paired."),
        (
            "CLIP score",
            f"{CONVENTION} of each picture with its prompt, averaged over {clip['base']['n']} "
            f"pictures of {clip['base']['groups']} prompts. Interval: {clip['interval']}.",
        ),
        (
            "Extractor",
            f"{extractor['name']}, weights sha256 {extractor['sha256']}. "
            f"Pictures are resized by {extractor['resize']}.",
        ),
        (
            "Pictures",
            f"{how['steps']} steps, guidance {how['guidance']:g}, {scheduler['_class_name']} "
            f"({scheduler.get('prediction_type', 'epsilon')}), {how['dtype']} on {how['device']}; "
            f"seeds {samples[0]['seed']} to {samples[-1]['seed']}; sizes {_sizes(samples)}; "
            "rounded to 8 bits, PNG.",
        ),
        (
            "Held-out pictures",
            f"{metrics['reference']['pictures']}, scaled and cropped to their bucket as in "
            f"training, sha256 of their hashes {metrics['reference']['sha256']}.",
        ),
    ]


def _first_of_each_prompt(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for sample in samples:
        first.setdefault(sample["prompt"], sample)
    return list(first.values())


def _evenly(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    count = min(_SHOWN, len(samples))
    return [samples[k * len(samples) // count] for k in range(count)]


def _compare(sample: dict[str, Any], folder: Path, nearest: Nearest) -> Comparison:
    cosine = f"cosine {sample['nearest']['cosine']:.2f}"
    return Comparison(
        sample["prompt"],
        [
            Panel(folder / sample["base"]["file"], "base", _clip(sample["base"])),
            Panel(folder / sample["finetuned"]["file"], "fine-tuned", _clip(sample["finetuned"])),
            Panel(nearest(sample), "nearest held-out", cosine),
        ],
    )


def _clip(picture: dict[str, Any]) -> str:
    return f"CLIP {number(100 * max(picture['cosine'], 0))}"


def _gain(sample: dict[str, Any]) -> float:
    return sample["finetuned"]["cosine"] - sample["base"]["cosine"]


def _cell(score: dict[str, float], key: str) -> tuple[str, str]:
    return number(score[key]), f"{number(score['low'])} to {number(score['high'])}"


def _change(scores: dict[str, Any], key: str) -> tuple[str, str]:
    before, change = scores["base"][key], scores["change"]
    share = f" ({signed(100 * change[key] / before, '.1f')} %)" if before > 0 else ""
    return signed(change[key]) + share, f"{signed(change['low'])} to {signed(change['high'])}"


def _sizes(samples: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{w}x{h}" for w, h in sorted({tuple(s["size"]) for s in samples}))
