"""What DreamBooth trains on beside its subjects: pictures of their class, given or made by the
base, or the subjects' own once more, where the base's prediction is all that is wanted of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.images import Size
from data.order import Order
from data.pairing import (
    Doubled,
    Pairing,
    Partners,
    check_enough,
    in_proportion,
    samples_per_bucket,
    share_out,
)
from train import models, rundir
from train.config import CaptionConfig, DreamBoothRun, SourceConfig, UserError
from train.pictures import Part, Pictures, find_part

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.loader import Beside
    from train.method import Pipeline

MADE = "prior-"  # how the folders of pictures that the base made begin, in the cache


@dataclass(frozen=True)
class Class:
    """One class, and its concepts."""

    prompt: str
    sources: tuple[int, ...]
    """Which of the data's sources are its concepts."""
    path: str | None
    """Where its pictures are, if they are given."""
    part: Part | None = None
    """Its pictures, once they are known."""


@dataclass(frozen=True)
class ClassPictures:
    """The pictures beside those of the subjects, in their buckets, and what becomes of them."""

    classes: list[Class]
    parts: list[Part]
    """One per class; where every picture is its own partner, one per source."""
    own: bool
    """Whether every picture is its own partner."""
    weight: float
    predicted: bool
    seed: int

    def joined(self, pictures: Pictures) -> Pictures:
        """All that is trained on, the subjects' pictures first."""
        return Pictures([*pictures.parts, *self.parts])

    def beside(self, pictures: Pictures, order: Order) -> Beside:
        """Which of them stand beside the samples of each step of an order of `pictures`."""
        from data.loader import Beside

        partners = self._partners(pictures, order)
        return Beside(partners=partners, weight=self.weight, predicted=self.predicted)

    def _partners(self, pictures: Pictures, order: Order) -> Partners:
        if self.own:
            return Doubled(order, len(pictures.sizes))
        of_source = {source: k for k, one in enumerate(self.classes) for source in one.sources}
        return Pairing(
            order,
            seed=self.seed,
            sizes=pictures.sizes,
            sources=pictures.records.sources,
            classes=[of_source[source] for source in range(len(pictures.parts))],
            class_sizes=np.concatenate([part.sizes for part in self.parts]),
            class_of=np.repeat(range(len(self.parts)), [len(part.sizes) for part in self.parts]),
        )


@dataclass(frozen=True)
class Planned:
    """The classes of a run before anything heavy is loaded: given pictures scanned, the others to
    be made."""

    config: DreamBoothRun

    @cached_property
    def classes(self) -> list[Class]:
        """None where there is no prior. Raises UserError for given pictures that cannot be
        used."""
        if self.config.dreambooth.prior == "none":
            return []
        members: dict[tuple[str, str | None], list[int]] = {}
        for source, (prompt, path) in enumerate(self.config.classes()):
            assert prompt is not None  # the configuration saw to that
            members.setdefault((" ".join(prompt.split()), path), []).append(source)
        return [self._class(*named, tuple(sources)) for named, sources in members.items()]

    def _class(self, prompt: str, path: str | None, sources: tuple[int, ...]) -> Class:
        found = Class(prompt, sources, path)
        return found if path is None else replace(found, part=self._scan(found, path))

    def _scan(self, one: Class, path: str) -> Part:
        try:
            return find_part(self.config.data, self._settings(one, path))
        except UserError as error:
            raise UserError(f"dreambooth.class_path={path}: {error}") from None

    def _settings(self, one: Class, path: str) -> SourceConfig:
        """Its pictures have their own captions, or else the class prompt."""
        first = self.config.data.named_sources()[one.sources[0]]
        facts = {"max_tokens": first.tokens, "wildcards": "{" in one.prompt}
        worded = CaptionConfig.model_validate(facts)
        # A slash, which no source's name has, keeps the ids of the two apart.
        return SourceConfig(
            path=path,
            name=f"class/{first.name}",
            caption=one.prompt,
            captions=worded,
            resolution=first.resolution,
            crop=first.crop,
        )

    @property
    def own(self) -> bool:
        """Whether the subjects' own pictures are what the base's prediction is learned from."""
        return self.config.dreambooth.prior == "prediction" and not any(
            one.path for one in self.classes
        )

    def check(self, pictures: Pictures) -> list[str]:
        """Lines for the plan. Raises UserError where the classes cannot go with these pictures."""
        lines = [f"class    {one.prompt}: {self._checked(one, pictures)}" for one in self.classes]
        given = [one.part.source for one in self.classes if one.part is not None]
        return [*lines, *(f"note     {note}" for source in given for note in source.notes)]

    def _checked(self, one: Class, pictures: Pictures) -> str:
        if self.own:
            return "as the base predicts it for the same pictures"
        count = len(one.part.sizes) if one.part else self.config.dreambooth.class_images
        check_enough(self._samples(one, pictures), count, what=one.prompt)
        if one.part is not None:
            return f"{count} pictures ({one.part.source.recognised})"
        self._check_can_make()
        rundir.check_space(
            self.config.data.cache, self._bytes(pictures, count), what="class pictures"
        )
        return f"{count} pictures that the base makes"

    def _check_can_make(self) -> None:
        model = self.config.model
        family = models.inspect(model).family
        if family.depth or family.inpainting:
            raise UserError(
                f"model.path={model.path} is {family}, which makes no pictures from words alone; "
                "set dreambooth.prior=prediction, or dreambooth.class_path=my/class/pictures"
            )

    def _samples(self, one: Class, pictures: Pictures) -> dict[Size, int]:
        order = pictures.order(seed=self.config.seed, batch_size=self.config.pictures_per_step)
        return samples_per_bucket(order, one.sources)

    def _bytes(self, pictures: Pictures, count: int) -> int:
        """At most 3 bytes per pixel of a PNG, and its cached latents."""
        pixels = int(pictures.sizes.astype(np.int64).prod(axis=1).max())
        return count * (3 * pixels + pixels // 64 * 8 * 2)

    def manifest(self, pictures: Pictures) -> dict[str, Any]:
        """For the manifest's dataset: the classes, and a hash of the given pictures too."""
        given = [one.part for one in self.classes if one.part is not None]
        names = [{"prompt": one.prompt, "path": one.path} for one in self.classes]
        if not given:
            return {"classes": names}
        prints = f"{pictures.fingerprint} {Pictures(given).fingerprint}"
        return {"classes": names, "sha256": hashlib.sha256(prints.encode()).hexdigest()[:16]}

    def complete(
        self, pictures: Pictures, pipeline: Pipeline, accelerator: Accelerator
    ) -> ClassPictures | None:
        """All class pictures, in the buckets of `pictures`; the base makes what is not given. None
        where there is no prior."""
        if not self.classes:
            return None
        wanted = self.config.dreambooth
        return ClassPictures(
            self.classes,
            self._own_parts(pictures)
            if self.own
            else [self._part(one, pictures, pipeline, accelerator) for one in self.classes],
            own=self.own,
            weight=wanted.prior_weight,
            predicted=wanted.prior == "prediction",
            seed=self.config.seed,
        )

    def _own_parts(self, pictures: Pictures) -> list[Part]:
        """Each source once more, for its class."""
        of_source = {source: one for one in self.classes for source in one.sources}
        return [
            replace(part, settings=self._doubled(of_source[number], part.settings))
            for number, part in enumerate(pictures.parts)
        ]

    def _doubled(self, one: Class, settings: SourceConfig) -> SourceConfig:
        worded = self._settings(one, settings.path).captions
        assert worded is not None
        worded = worded.model_copy(update={"replace": one.prompt})
        return settings.model_copy(update={"name": f"class/{settings.name}", "captions": worded})

    def _part(
        self, one: Class, pictures: Pictures, pipeline: Pipeline, accelerator: Accelerator
    ) -> Part:
        samples = self._samples(one, pictures)
        part = one.part
        if part is None:
            folder = self._make(one, samples, pipeline, accelerator)
            part = self._scan(one, str(folder))
            # An earlier run may have wanted more.
            table = part.source.table.take(range(self.config.dreambooth.class_images))
            part = replace(part, source=replace(part.source, table=table))
        table = part.source.table
        sizes = share_out(samples, table.widths, table.heights, what=one.prompt)
        return replace(part, sizes=sizes)

    def _make(
        self,
        one: Class,
        samples: dict[Size, int],
        pipeline: Pipeline,
        accelerator: Accelerator,
    ) -> Path:
        """The folder of the class's pictures, every process having made its share of what it
        lacked."""
        wanted = self.config.dreambooth
        sizes = in_proportion(samples, wanted.class_images, each=True)
        folder = self.config.data.cache / f"{MADE}{self._key(one, samples, pipeline)}"
        paths = _generate(one.prompt, sizes, folder, pipeline, self.config, accelerator)
        accelerator.wait_for_everyone()
        accelerator.print(f"class    {one.prompt}: {len(paths)} pictures in {folder}")
        if accelerator.is_main_process:
            _say_flat(paths)
        return folder

    def _key(self, one: Class, samples: dict[Size, int], pipeline: Pipeline) -> str:
        """Of all that the pictures depend on but their number: more are only added."""
        from eval.generation import scheduler_settings, weights
        from train.models import tokenizer_fingerprint

        total = sum(samples.values())
        wanted = self.config.dreambooth
        facts = [
            weights(pipeline),
            tokenizer_fingerprint(pipeline.tokenizer),
            scheduler_settings(pipeline),
            (wanted.class_steps, wanted.class_guidance, self.config.train.mixed_precision),
            one.prompt,
            [(size, round(many / total, 9)) for size, many in samples.items()],
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _generate(
    prompt: str,
    sizes: Sequence[Size],
    folder: Path,
    pipeline: Pipeline,
    config: DreamBoothRun,
    accelerator: Accelerator,
) -> list[Path]:
    """Picture k has the seed k, whatever the run's is, so that runs can share them."""
    from eval.generation import NotFinite, generate

    try:
        with accelerator.autocast():
            return generate(
                pipeline,
                [prompt] * len(sizes),
                seeds=range(len(sizes)),
                steps=config.dreambooth.class_steps,
                guidance=config.dreambooth.class_guidance,
                size=sizes,
                batch_size=config.dreambooth.class_batch_size,
                folder=folder,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                label="making class pictures",
            )
    except NotFinite as error:
        raise UserError(
            f"dreambooth.prior=images: {error.what} at train.mixed_precision="
            f"{config.train.mixed_precision}. Use bf16 or no; if that does not help, the base is "
            "broken"
        ) from None
    except OSError as error:
        raise UserError(f"data.cache={config.data.cache} cannot be used ({error})") from None


def _say_flat(paths: Sequence[Path]) -> None:
    from data.listing import few
    from eval.generation import of_one_colour

    if flat := of_one_colour(paths):
        what = few("class pictures of one colour all over, which teach nothing", flat)
        print(f"note     {what}: look at them, and choose another dreambooth.class_prompt")
