"""What an evaluation starts from: a finished run and pictures, checked before models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from train.config import (
    DreamBoothRun,
    EvaluationConfig,
    RunConfig,
    TextualInversionRun,
    UserError,
    load,
    read_yaml,
)

if TYPE_CHECKING:
    from data.images import Size
    from data.records import Record
    from data.wording import Wording
    from eval.arms import Plan, Task
    from eval.protocols import Protocol


IN_TRAINING = 1_000_000  # added to the seeds of pictures that are made during training


@dataclass(frozen=True)
class Given:
    """What an evaluation has to go by."""

    protocol: Protocol | None
    """None: the held-out captions are the prompts."""
    held_out: list[Record]
    """Captioned as training would word them."""
    training: list[Record]
    subject: str | None
    noun: str | None
    buckets: list[Size]
    mirrored: bool
    """Whether the training pictures were trained on as in a mirror too."""
    notes: list[str]
    """What could not be had, as sentences for the report."""

    @property
    def is_of_captions(self) -> bool:
        """Whether the held-out captions are the prompts, so that their pictures are what the
        results should be like."""
        return self.protocol is None and bool(self.held_out)

    @property
    def likeness_to(self) -> str:
        return "the style" if self.name == "style" else "the subject"

    @property
    def name(self) -> str:
        return self.protocol.name if self.protocol else "held_out"


def split(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The run directory and the overrides."""
    runs = [text.removeprefix("run=") for text in arguments if text.startswith("run=")]
    if len(runs) != 1 or not runs[0]:
        raise UserError("which run? give run=runs/NAME (once), or images=DIR reference=DIR")
    return Path(runs[0]), [text for text in arguments if not text.startswith("run=")]


def read_run(run: Path, overrides: Sequence[str]) -> RunConfig:
    """The run's own configuration with overrides; whichever method trained it."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"run={run}: no config.yaml there; give the directory of a training run")
    try:
        values = read_yaml(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None
    sections = set(values) if isinstance(values, dict) else set()
    # The method that knows the most of its sections: several have a `lora`.
    schemas: list[type[RunConfig]] = [RunConfig, *RunConfig.__subclasses__()]
    schema = max(schemas, key=lambda schema: len(sections & schema.model_fields.keys()))
    return load(schema, ["--config", str(file), *overrides])


def find_result(run: Path) -> Path:
    """What the run trained: adapter/ or full/."""
    for result in (run / "adapter", run / "full"):
        if list(result.glob("*.safetensors")) or (result / "model_index.json").is_file():
            return result
    raise UserError(f"run={run}: neither adapter/ nor full/ there; let the training finish first")


def gather(config: RunConfig) -> Given:
    """Reads and checks all that the evaluation needs. Raises UserError where it cannot be done."""
    settings = config.evaluation
    check_extractors(settings)
    if settings.protocol in (None, "held_out") and settings.path is None:
        raise UserError(
            "evaluation.path is not set: give a folder of captioned pictures the training did not "
            "see, evaluation.path=DIR, or prompts, evaluation.protocol=objects, living, style or a "
            "YAML file"
        )
    subject, noun = _names(config)
    notes: list[str] = []
    if subject is None and isinstance(config, DreamBoothRun | TextualInversionRun):
        notes.append(
            "What prompts call the subject could not be told from the run, so likeness was not "
            "measured: give evaluation.subject= and evaluation.noun=."
        )
    held_out = read_held_out(config, subject) if settings.path else []
    return Given(
        protocol=_protocol(settings, subject, noun),
        held_out=held_out,
        training=_training(config, notes),
        subject=subject,
        noun=noun,
        buckets=buckets_of(config),
        mirrored=config.data.flip,
        notes=notes,
    )


def plan(config: RunConfig, given: Given, *, images: int | None = None) -> Plan:
    """All pictures to make; `images`: during training, so many of the samples and none of the
    others, and of other seeds, so that what chose a checkpoint is not what it is judged by."""
    from eval import arms

    settings, size = config.evaluation, square(config, given.buckets)
    seed = settings.seed + (IN_TRAINING if images else 0)
    if given.protocol is None:
        samples = arms.of_captions(
            given.held_out,
            images=images or settings.images,
            buckets=given.buckets,
            seed=seed,
        )
        samples = [_with_class(task, given) for task in samples]
        prior, general = _class_prompts(config), settings.general
    else:
        each = settings.per_prompt
        if images:
            each = max(1, images // len(given.protocol.prompts))
        samples = arms.of_protocol(given.protocol, per_prompt=each, size=size, seed=seed)
        samples = arms.spread(samples, images) if images else samples
        prior = list(given.protocol.prior_prompts)
        general = settings.general or list(given.protocol.general)
    if images:
        return arms.Plan(samples, [], [], [])
    return arms.Plan(
        samples,
        arms.of_class(prior, size=size, seed=settings.seed),
        arms.plain(general, size=size, seed=settings.seed),
        sorted({*(settings.scales or (given.protocol.scales if given.protocol else ()))}),
    )


def check_extractors(settings: EvaluationConfig) -> None:
    """UserError for what cannot be an extractor, before anything heavy is loaded."""
    from eval.features import find_clip, find_extractor

    for key, find in (("clip", find_clip), ("features", find_extractor), ("dino", find_extractor)):
        try:
            if path := getattr(settings, key):
                find(path)
        except UserError as error:
            raise UserError(f"evaluation.{key}: {error}") from None


def read_held_out(config: RunConfig, subject: str | None = None) -> list[Record]:
    """The pictures of evaluation.path, each with the one caption that training would have given it
    but for chance; UserError where they cannot serve.

    Where training replaces captions or puts them into templates, those that name the subject
    already say more, and stay as they are.
    """
    from data.sources import scan
    from data.wording import Wording
    from train.validation_data import data_at, settled

    path = config.evaluation.path
    settings = data_at(config, str(path)).named_sources()[0]
    try:
        records = list(scan(str(path), caption=settings.caption).table)
    except UserError as error:
        named = str(error).replace("data.path=", "evaluation.path=")
        raise UserError(
            named.replace(", or leave them out with data.on_bad_image=report", "")
        ) from None
    if len(records) < 2:
        raise UserError(f"evaluation.path={path} holds {len(records)} picture; use more")
    wording = settled(Wording.of(settings.captions or config.data.captions))
    own = replace(wording, replace="", templates=())
    return [_worded(record, own if _names_it(record, subject) else wording) for record in records]


def buckets_of(config: RunConfig) -> list[Size]:
    """The sizes that the run's pictures are brought to."""
    from data.buckets import make_buckets

    data = config.data
    return make_buckets(
        data.resolutions[-1], step=data.bucket_step, min_side=data.min_side, max_side=data.max_side
    )


def square(config: RunConfig, buckets: Sequence[Size]) -> Size:
    """The bucket of a square picture."""
    from data.buckets import assign

    side = config.data.resolutions[-1]
    return assign(side, side, buckets)


def _names(config: RunConfig) -> tuple[str | None, str | None]:
    from eval import protocols

    settings = config.evaluation
    _protocol(settings, None, None)  # what is wrong with it comes first
    if settings.protocol == "style":
        return _style_name(config), settings.noun
    if settings.protocol not in (None, "held_out"):
        return protocols.names_of(config)
    try:
        return protocols.names_of(config)
    except UserError:
        if settings.subject or settings.noun:
            raise
        return None, None  # its captions are prompted as they are


def _style_name(config: RunConfig) -> str:
    if name := config.evaluation.subject or config.data.captions.trigger:
        return name
    raise UserError(
        "evaluation.protocol=style needs the words that call for the style: give "
        'evaluation.subject="zwx style"'
    )


def _protocol(settings: EvaluationConfig, subject: str | None, noun: str | None) -> Protocol | None:
    from eval import protocols

    if settings.protocol in (None, "held_out"):
        return None
    return protocols.load(str(settings.protocol), subject=subject or "", noun=noun or "")


def _training(config: RunConfig, notes: list[str]) -> list[Record]:
    """What the run was trained on, or a note."""
    from data.listing import few
    from eval.arms import spread
    from train import pictures

    most, data = config.evaluation.training_images, config.data
    if not most:
        return []
    if data.streaming:
        notes.append("The training pictures were streamed, so copies of them were not looked for.")
        return []
    quiet = data.model_copy(update={"on_bad_image": "report", "masks": False, "depth": False})
    try:
        found = pictures.find(quiet)
    except UserError as error:
        notes.append(
            f"The training pictures cannot be read, so copies were not looked for: {error}"
        )
        return []
    records = found.records
    if bad := [f"{one.id} {one.reason}" for one in found.rejected]:
        notes.append(f"Of the training pictures {few('cannot be read', bad)}.")
    if most < len(records):
        notes.append(f"Copies were looked for among {most} of {len(records)} training pictures.")
    return spread(records, most)


def _names_it(record: Record, subject: str | None) -> bool:
    from data.wording import whole_words

    return bool(subject) and any(map(whole_words(str(subject)).search, record.captions))


def _worded(record: Record, wording: Wording) -> Record:
    caption = wording.caption(record.captions[:1], seed=0, epoch=0, id=record.id)
    return replace(record, captions=(caption,))


def _with_class(task: Task, given: Given) -> Task:
    """The class's word for the subject's, where the caption names the subject."""
    from data.wording import whole_words

    if not given.subject or not given.noun:
        return task
    text, found = whole_words(given.subject).subn(lambda _: str(given.noun), task.prompt)
    return replace(task, class_prompt=text, described=text) if found else task


def _class_prompts(config: RunConfig) -> list[str]:
    """What DreamBooth prompts its class with; of wildcards several draws."""
    from data.wording import Wording
    from eval.arms import PRIOR

    if not isinstance(config, DreamBoothRun):
        return []
    prompts = sorted({prompt for prompt, _ in config.classes() if prompt})
    draws = PRIOR if any("{" in prompt for prompt in prompts) else 1
    wording = Wording(wildcards=True)
    return [
        wording.caption((prompt,), seed=config.evaluation.seed, epoch=0, id=str(k))
        for prompt in prompts
        for k in range(draws)
    ]
