"""What DreamBooth trains on beside its subjects: pictures of their class, given or made by the
base (train/made_pictures.py), or the subjects' own once more, where the base's prediction is all
that is wanted of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from data.buckets import account
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
from data.records import Table
from train import made_pictures, models, rundir
from train.config import CaptionConfig, DreamBoothRun, SourceConfig, UserError
from train.made_pictures import Wanted
from train.pictures import Part, Pictures, find_part

if TYPE_CHECKING:
    from accelerate import Accelerator

    from data.loader import Beside
    from train.method import Pipeline


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
        if self.config.dreambooth.prior == "prediction":
            self._check_predicted()
        if self._lacking:
            self._check_can_make()
        lines = [f"class    {one.prompt}: {self._checked(one, pictures)}" for one in self.classes]
        self._check_space(pictures)
        given = [one.part.source for one in self.classes if one.part is not None]
        return [*lines, *(f"note     {note}" for source in given for note in source.notes)]

    def _checked(self, one: Class, pictures: Pictures) -> str:
        if self.own:
            return "as the base predicts it for the same pictures"
        if one.part is not None:
            return self._account(one, one.part, pictures)
        count = self.config.dreambooth.class_images
        check_enough(self._samples(one, pictures), count, what=one.prompt)
        return f"{count} pictures that the base makes"

    def _account(self, one: Class, part: Part, pictures: Pictures) -> str:
        """What becomes of given pictures in the buckets of the subjects'."""
        shared = self._shared_out(one, part, pictures)
        table, left_out = shared.source.table, len(part.sizes) - len(shared.sizes)
        kept = account(table.widths, table.heights, shared.sizes)
        facts = {
            f"{100 * kept.cropped.mean():.0f} % of them cropped": kept.cropped.any(),
            f"{kept.enlarged.sum()} enlarged": kept.enlarged.any(),
            f"{left_out} smaller than their bucket left out": left_out,
        }
        said = [part.source.recognised, *(fact for fact, is_so in facts.items() if is_so)]
        return f"{len(shared.sizes)} pictures ({'; '.join(said)})"

    @property
    def _lacking(self) -> list[Class]:
        """The classes whose pictures are to be made."""
        return [] if self.own else [one for one in self.classes if one.part is None]

    def _check_predicted(self) -> None:
        """The base predicts well only what it was trained on."""
        diffusion, base = self.config.diffusion, models.inspect(self.config.model)
        if diffusion.zero_terminal_snr:
            override = "diffusion.zero_terminal_snr=true"
        elif diffusion.prediction_type not in (None, base.prediction_type):
            override = f"diffusion.prediction_type={diffusion.prediction_type}"
        else:
            return
        raise UserError(
            f"dreambooth.prior=prediction: the base predicts {base.prediction_type} on its own "
            f"noise schedule, which is no target for {override}: leave that out, or set "
            "dreambooth.prior=images"
        )

    def _check_can_make(self) -> None:
        model = self.config.model
        family = models.inspect(model).family
        if family.depth or family.inpainting:
            raise UserError(
                f"model.path={model.path} is {family}, which makes no pictures from words alone; "
                "set dreambooth.prior=prediction, or dreambooth.class_path=my/class/pictures"
            )

    def _check_space(self, pictures: Pictures) -> None:
        """For pictures to be made: at most 3 bytes per pixel of a PNG, and its cached latents."""
        if not self._lacking or rundir.has_checkpoints(self.config.output):
            return  # a run that is resumed has taken its space
        pixels = int(pictures.sizes.astype(np.int64).prod(axis=1).max())
        count = self.config.dreambooth.class_images * len(self._lacking)
        needed = count * (3 * pixels + pixels // 64 * 8 * 2)
        rundir.check_space(self.config.data.cache, needed, what="class pictures")

    def _samples(self, one: Class, pictures: Pictures) -> dict[Size, int]:
        order = pictures.order(seed=self.config.seed, batch_size=self.config.pictures_per_step)
        return samples_per_bucket(order, one.sources)

    def _shared_out(self, one: Class, part: Part, pictures: Pictures) -> Part:
        """Given pictures in the buckets of the subjects': without upscale those that fill them."""
        samples, table = self._samples(one, pictures), part.source.table
        sizes = share_out(samples, table.widths, table.heights, what=one.prompt)
        fills = ~account(table.widths, table.heights, sizes).enlarged
        if self.config.data.upscale or fills.all():
            return replace(part, sizes=sizes)
        if empty := samples.keys() - set(map(tuple, sizes[fills].tolist())):
            width, height = max(empty)
            raise UserError(
                f"dreambooth.class_path={one.path}: no picture is large enough to stand beside the "
                f"subject's of {width}x{height} pixels, and data.upscale is off. Add larger ones, "
                "or set data.upscale=true"
            )
        source = replace(part.source, table=table.take(np.flatnonzero(fills)))
        return replace(part, source=source, sizes=sizes[fills])

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
            else self._class_parts(pictures, pipeline, accelerator),
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

    def _class_parts(
        self, pictures: Pictures, pipeline: Pipeline, accelerator: Accelerator
    ) -> list[Part]:
        wanted = {one.prompt: self._wanted(one, pictures) for one in self._lacking}
        everything = list(chain.from_iterable(wanted.values()))
        # All at once: what the base is must be found out only once.
        folder = made_pictures.make(everything, pipeline, self.config, accelerator)
        return [
            self._shared_out(one, one.part, pictures)
            if one.part is not None
            else self._made(one, wanted[one.prompt], folder, accelerator)
            for one in self.classes
        ]

    def _wanted(self, one: Class, pictures: Pictures) -> list[Wanted]:
        count = self.config.dreambooth.class_images
        sizes = in_proportion(self._samples(one, pictures), count, each=True)
        return made_pictures.wanted(one.prompt, sizes)

    def _made(
        self, one: Class, wanted: list[Wanted], folder: Path, accelerator: Accelerator
    ) -> Part:
        """The pictures that were made, without what other runs wanted."""
        of_name = {PurePath(picture.name).name: picture for picture in wanted}
        inside = folder / PurePath(wanted[0].name).parent
        accelerator.print(f"class    {one.prompt}: {len(wanted)} pictures in {inside}")
        part = self._scan(one, str(inside))
        records = [record for record in part.source.table if record.id in of_name]
        worded = [replace(r, captions=(of_name[r.id].prompt,)) for r in records]
        source = replace(part.source, table=Table.of(worded))
        sizes = np.array([of_name[record.id].size for record in records], np.int32)
        return replace(part, source=source, sizes=sizes)
