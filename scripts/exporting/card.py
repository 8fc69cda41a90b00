"""The model card: what was made of which pictures, how well it does, and how it is used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.score_table import decimals, figure, scores_of
from eval.scores import ARMS, Score, Value
from scripts.exporting.results import Result
from train import report
from train.run_record import Run, read_json

MOST_PICTURES = 6
_SETTINGS = (
    *("train.steps", "train.batch_size", "train.mixed_precision", "optim.name"),
    *("optim.learning_rate", "optim.schedule", "lora.rank", "lora.alpha", "lora.dropout"),
    *("diffusion.prediction_type", "diffusion.min_snr_gamma", "data.resolution", "seed"),
)
_TAGS = {
    "lora": ["lora", "text-to-image"],
    "textual-inversion": ["textual_inversion", "text-to-image"],
    "model": ["text-to-image"],
}
_LIBRARIES = {
    "diffusers": "diffusers",
    "merged": "diffusers",
    "kohya": None,
    "single_file": None,
}


@dataclass(frozen=True)
class Sample:
    """A picture that the run has drawn, and the same prompt and seed of its base."""

    prompt: str
    picture: Path
    base: Path | None


def samples(run: Path | None) -> list[Sample]:
    """Of a run's last previews, at most six; none where it drew none."""
    if run is None:
        return []
    record = Run.read(run, {})
    prompts = record.setting("preview.prompts") or []
    last = max((run / "previews").glob("step-*"), default=None)
    if last is None:
        return []
    found = []
    for number, prompt in enumerate(prompts[:MOST_PICTURES]):
        name = f"{number:02d}.png"
        if (last / name).is_file():
            base = run / "previews" / "base" / name
            found.append(Sample(str(prompt), last / name, base if base.is_file() else None))
    return found


def write(
    path: Path,
    result: Result,
    format: str,
    file: str,
    samples: Sequence[Sample],
    images: Path | None = None,
) -> None:
    """The card, and the pictures that it shows in the folder `images` beside it.

    file: what the export is called, or "" where the card lies in it.
    """
    images = images or path.with_name("images")
    path.write_text(text(result, format, file, samples, images.name), encoding="utf-8")
    if samples:
        _copy_samples(samples, images)


def _copy_samples(samples: Sequence[Sample], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        shutil.copyfile(sample.picture, folder / f"{number:02d}.png")
        if sample.base is not None:
            shutil.copyfile(sample.base, folder / f"{number:02d}-base.png")


def text(result: Result, format: str, file: str, samples: Sequence[Sample], images: str) -> str:
    """The card as Markdown with the hub's YAML before it; `file` and the folder `images` lie beside
    it."""
    record = Run.read(result.run, {}) if result.run else None
    parts = [
        f"# {result.name}",
        _introduction(result, record),
        *([_gallery(samples, images)] if samples else []),
        f"## Use\n\n{_use(result, format, file)}",
        *(_training(record) if record else []),
        *(_evaluation(result.run) if result.run else []),
    ]
    return _front_matter(result, format, record, samples, images) + "\n" + "\n\n".join(parts) + "\n"


def _front_matter(
    result: Result, format: str, record: Run | None, samples: Sequence[Sample], images: str
) -> str:
    from huggingface_hub import ModelCardData

    base = str(record.setting("model.path")) if record else ""
    own: dict[str, Any] = {
        "widget": [
            {"text": sample.prompt, "output": {"url": f"{images}/{number:02d}.png"}}
            for number, sample in enumerate(samples)
        ],
        "instance_prompt": record.setting("data.caption") if record else None,
    }
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name=_LIBRARIES[format],
        pipeline_tag="text-to-image",
        tags=["sd-atelier", "stable-diffusion", *_TAGS[result.kind]],
        **{name: value for name, value in own.items() if value},
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _is_hub_id(base: str) -> bool:
    return not Path(base).exists() and base.count("/") == 1 and not base.startswith((".", "/"))


def _public(base: str) -> str:
    """A base by a name that tells nobody's folders."""
    return base if _is_hub_id(base) else Path(base).name


def _introduction(result: Result, record: Run | None) -> str:
    what = {
        "lora": "A LoRA adapter",
        "textual-inversion": "An embedding (textual inversion)",
        "model": "A fine-tuned model",
    }[result.kind]
    if record is None:
        return f"{what}."
    base = record.manifest.get("base", {})
    predicts = base.get("prediction_type")
    return (
        f"{what} of `{_public(str(record.setting('model.path')))}`"
        + (f", which predicts {predicts} at {base.get('resolution')} px" if predicts else "")
        + f", trained with sd-atelier {record.manifest.get('sd_atelier', '')}. "
        + report.verdict(record)
    )


def _gallery(samples: Sequence[Sample], images: str) -> str:
    rows = ["| prompt | this | its base, same seed |", "| --- | --- | --- |"]
    for number, sample in enumerate(samples):
        path = f"{images}/{number:02d}"
        base = f"![]({path}-base.png)" if sample.base else ""
        rows.append(f"| {_cell(sample.prompt)} | ![]({path}.png) | {base} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """As it can stand in a table of Markdown."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return plain.replace("<", "&lt;").replace(">", "&gt;")


def _use(result: Result, format: str, file: str) -> str:
    if format == "diffusers" and not result.is_model:
        return _code("python", _with_diffusers(result))
    if format in ("diffusers", "merged"):
        call = 'pipeline = StableDiffusionPipeline.from_pretrained("THIS FOLDER")'
        return _code("python", f"from diffusers import StableDiffusionPipeline\n\n{call}")
    if format == "single_file":
        return (
            f"Put `{file}` into `models/Stable-diffusion` (AUTOMATIC1111, Forge) or "
            "`models/checkpoints` (ComfyUI)."
        )
    if result.lora:
        return (
            f"Put `{file}` into `models/Lora` (AUTOMATIC1111, Forge) and write "
            f"`<lora:{Path(file).stem}:1>` into the prompt, or into `models/loras` (ComfyUI)."
        )
    return (
        f"Put `{file}` into `embeddings` (AUTOMATIC1111, Forge) and write `{Path(file).stem}` into "
        f"the prompt, or into `models/embeddings` (ComfyUI: `embedding:{Path(file).stem}`)."
    )


def _with_diffusers(result: Result) -> str:
    base = _public(result.base.path) if result.base else "ITS BASE"
    lines = [
        "from diffusers import StableDiffusionPipeline",
        "",
        f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")',
    ]
    if result.lora:
        lines.append('pipeline.load_lora_weights("THIS FOLDER")')
    for file in result.embeddings:
        lines.append(f'pipeline.load_textual_inversion("THIS FOLDER", weight_name="{file.name}")')
    if (result.folder / "scheduler").is_dir():
        lines += [
            "# As it was trained:",
            "pipeline.scheduler = type(pipeline.scheduler).from_pretrained(",
            '    "THIS FOLDER", subfolder="scheduler"',
            ")",
        ]
    return "\n".join(lines)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _training(record: Run) -> Iterator[str]:
    dataset = record.dataset
    pictures = dataset.get("pictures")
    if pictures:
        buckets = dataset.get("buckets") or {}
        sizes = ", ".join(f"{count} of {_cell(str(size))}" for size, count in buckets.items())
        yield f"## Training data\n\n{pictures} pictures" + (f": {sizes}." if sizes else ".")
    settings = [(key, record.setting(key)) for key in _SETTINGS]
    rows = [f"| {key} | {_cell(str(value))} |" for key, value in settings if value is not None]
    versions = record.manifest.get("packages", {})
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "## Settings\n\n" + "\n".join(["| key | value |", "| --- | --- |", *rows])
    if said:
        yield f"Made with {said}."


def _evaluation(run: Path) -> Iterator[str]:
    metrics = read_json(run / "eval" / "metrics.json")
    scores = scores_of(metrics) if metrics else {}
    if not scores:
        yield (
            "## Evaluation\n\nNone was made. `accelerate launch eval/evaluate.py run=...` measures "
            "it against its base, with intervals."
        )
        return
    rows = [row for score in scores.values() for row in _score_row(score)]
    head = ["| metric | base | this | change (95 % interval) |", "| --- | --- | --- | --- |"]
    yield (
        "## Evaluation\n\n"
        + _cell(str(metrics.get("verdict", "")))
        + "\n\n"
        + "\n".join(head + rows)
    )
    if warnings := metrics.get("warnings"):
        yield " ".join(map(_cell, warnings))


def _score_row(score: Score) -> Iterator[str]:
    if "finetuned" not in score.values:
        return
    digits = decimals(score)
    cells = [_value(score.values.get(arm), digits) for arm in ("base", "finetuned")]
    change = score.change
    moved = ""
    if change is not None and score.against in ("base", ARMS["base"]):
        low, high = (figure(end, digits, sign=True) for end in (change.low, change.high))
        moved = f"{figure(change.value, digits, sign=True)} ({low} to {high})"
    better = {"less": ", less is better", "more": ", more is better", None: ""}[score.better]
    yield f"| {_cell(score.title)}{better} | {cells[0]} | {cells[1]} | {moved} |"


def _value(value: Value | None, digits: int) -> str:
    return figure(value.value, digits) if value else ""
