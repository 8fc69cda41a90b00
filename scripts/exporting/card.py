"""The model card: what was made of which pictures, how well it does, and how it is used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
_WHAT = {
    "lora": "A LoRA adapter",
    "textual-inversion": "An embedding (textual inversion)",
    "model": "A fine-tuned model",
}
_IMPORT = "from diffusers import StableDiffusionPipeline"
HERE = "THIS FOLDER"
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


@dataclass(frozen=True)
class Card:
    """The card of a result that is exported in a format, to a file or folder called `file`."""

    result: Result
    format: str
    scale: float
    file: str
    samples: Sequence[Sample]

    def write(self, path: Path, images: Path) -> None:
        """Writes it, and the pictures that it shows to the folder `images` beside it."""
        path.write_text(self.text(images.name), encoding="utf-8")
        if self.samples:
            _copy_samples(self.samples, images)

    def text(self, images: str) -> str:
        """As Markdown with the hub's YAML before it."""
        run = self.result.run
        parts = [
            f"# {self.result.name}",
            self._introduction(),
            *([_gallery(self.samples, images)] if self.samples else []),
            f"## Use\n\n{self._use()}",
            *(_training(self.record) if self.record else []),
            *(_evaluation(run) if run else []),
        ]
        return self._front_matter(images) + "\n" + "\n\n".join(parts) + "\n"

    @cached_property
    def record(self) -> Run | None:
        return Run.read(self.result.run, {}) if self.result.run else None

    @property
    def kind(self) -> str:
        """Of what is written: a merged adapter is a model."""
        return "model" if self.format in ("merged", "single_file") else self.result.kind

    @property
    def base(self) -> str:
        """By a name that tells nobody's folders; "" if it is not known."""
        return public(self.result.base.path) if self.result.base else ""

    def _front_matter(self, images: str) -> str:
        from huggingface_hub import ModelCardData

        own: dict[str, Any] = {
            "widget": [
                {"text": sample.prompt, "output": {"url": f"{images}/{number:02d}.png"}}
                for number, sample in enumerate(self.samples)
            ],
            "instance_prompt": self.record.setting("data.caption") if self.record else None,
        }
        data = ModelCardData(
            base_model=self.base if "/" in self.base else None,
            library_name=_LIBRARIES[self.format],
            pipeline_tag="text-to-image",
            tags=["sd-atelier", "stable-diffusion", *_TAGS[self.kind]],
            **{name: value for name, value in own.items() if value},
        )
        return f"---\n{data.to_yaml()}\n---\n"

    def _introduction(self) -> str:
        of = f" of `{self.base}`" if self.base else ""
        what = f"{_WHAT[self.result.kind]}{of}"
        if self.kind != self.result.kind:
            merged = _WHAT[self.result.kind]
            what = f"A whole model: {merged[0].lower()}{merged[1:]} in the weights{of}, at scale "
            what += f"{self.scale:g}"
        if self.record is None:
            return f"{what}."
        base = self.record.manifest.get("base", {})
        predicts = base.get("prediction_type")
        return (
            what
            + (f", which predicts {predicts} at {base.get('resolution')} px" if predicts else "")
            + f", trained with sd-atelier {self.record.manifest.get('sd_atelier', '')}. "
            + report.verdict(self.record)
        )

    def _use(self) -> str:
        name = Path(self.file).stem
        if self.format == "diffusers" and not self.result.is_model:
            return _code(self._with_diffusers())
        if self.format in ("diffusers", "merged"):
            load = f'pipeline = StableDiffusionPipeline.from_pretrained("{HERE}")'
            return _code(f"{_IMPORT}\n\n{load}")
        if self.format == "single_file":
            return (
                f"Put `{self.file}` into `models/Stable-diffusion` (AUTOMATIC1111, Forge) or "
                f"`models/checkpoints` (ComfyUI), and `{name}.yaml` beside it, if there is one."
            )
        if self.result.lora:
            return (
                f"Put `{self.file}` into `models/Lora` (AUTOMATIC1111, Forge) and write "
                f"`<lora:{name}:1>` into the prompt, or into `models/loras` (ComfyUI)."
            )
        return (
            f"Put `{self.file}` into `embeddings` (AUTOMATIC1111, Forge) and write `{name}` into "
            f"the prompt, or into `models/embeddings` (ComfyUI: `embedding:{name}`)."
        )

    def _with_diffusers(self) -> str:
        lines = [
            _IMPORT,
            "",
            f'pipeline = StableDiffusionPipeline.from_pretrained("{self.base or "ITS BASE"}")',
        ]
        if self.result.lora:
            lines.append(f'pipeline.load_lora_weights("{HERE}")')
        for file in map(embedding_name, self.result.embeddings):
            lines.append(f'pipeline.load_textual_inversion("{HERE}", weight_name="{file}")')
        if (self.result.folder / "scheduler").is_dir():
            lines += [
                "# As it was trained:",
                "pipeline.scheduler = type(pipeline.scheduler).from_pretrained(",
                f'    "{HERE}", subfolder="scheduler"',
                ")",
            ]
        return "\n".join(lines)


def embedding_name(file: Path) -> str:
    """What an embedding is called in a folder, where this project's commands look for it."""
    known = file.name.startswith("learned_embeds")
    return file.name if known else f"learned_embeds-{file.stem}.safetensors"


def public(base: str) -> str:
    """A base by a name that tells nobody's folders: a hub id as it is, a path by its last part."""
    path = Path(base)
    is_file = base.endswith(".safetensors") or path.exists()
    is_path = is_file or base.count("/") != 1 or base.startswith((".", "~"))
    return path.name if is_path else base


def _copy_samples(samples: Sequence[Sample], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        shutil.copyfile(sample.picture, folder / f"{number:02d}.png")
        if sample.base is not None:
            shutil.copyfile(sample.base, folder / f"{number:02d}-base.png")


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


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
