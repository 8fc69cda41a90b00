"""Pictures for evaluation: one PNG per prompt, whatever the batch, the process or an interruption.

Image k depends on its prompt, seed, size and the settings alone: its noise comes from a generator
of its own on the CPU. How many pictures are in its batch moves a value by rounding in the last
place, so batches are cut from the whole list, whatever is there already and however many processes
share them: a picture made again, or elsewhere, has the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.files import whole
from train import screens, stopping

Size = tuple[int, int]
K = TypeVar("K")
KEY = "sd-atelier"


class NotFinite(FloatingPointError):
    """A picture whose pixels are not numbers; `what` says which, without the remedy."""

    def __init__(self, prompt: str, seed: int) -> None:
        self.what = f"the picture of {prompt!r} with seed {seed} came out not finite"
        super().__init__(f"{self.what}: run with train.mixed_precision=no")


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: Size | Sequence[Size],
    batch_size: int,
    folder: Path,
    rank: int = 0,
    world: int = 1,
    label: str = "generating",
    negative_prompt: str = "",
    names: Sequence[str] | None = None,
) -> list[Path]:
    """Write folder/00000.png ..., or folder/NAME of `names`, for the prompts and return all N
    paths, in order.

    `seeds`: one per prompt; `size`: (width, height) in pixels, for all or one per prompt. Process
    `rank` of `world` makes every world-th batch, so the files are complete once all are done. The
    settings, with a fingerprint of the weights, stand in each PNG: a picture that is there with the
    same settings is kept, so the same call resumes.
    """
    sizes = _one_each(size, len(prompts))
    assert len(prompts) == len(seeds) == len(sizes), (len(prompts), len(seeds), len(sizes))
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler_settings(pipeline),
        "weights": weights(pipeline),
        **({"negative_prompt": negative_prompt} if negative_prompt else {}),
    }
    wanted = [
        common | {"prompt": prompt, "seed": int(seed), "size": list(size)}
        for prompt, seed, size in zip(prompts, seeds, sizes, strict=True)
    ]
    paths = [folder / name for name in names or map("{:05d}.png".format, range(len(prompts)))]
    write_missing(
        paths,
        wanted,
        sample=lambda batch: _sample(pipeline, [wanted[index] for index in batch]),
        batches=cut(sizes, batch_size)[rank::world],
        label=label,
        shown=rank == 0,
    )
    return paths


def write_missing(
    paths: Sequence[Path],
    wanted: Sequence[dict[str, Any]],
    *,
    sample: Callable[[list[int]], np.ndarray],
    batches: Sequence[list[int]],
    label: str = "generating",
    shown: bool = True,
    texts: Callable[[int], dict[str, str]] = lambda index: {},
) -> None:
    """Makes the pictures of `batches`, indices into `paths`, that are not there with the settings
    `wanted`, each a mapping that JSON gives back as it was.

    `sample`: indices of a whole batch -> pixels uint8 (B, H, W, 3); it is called where any of them
    is missing. `texts`: what else a picture's file says, by keyword.
    """
    missing = {k for batch in batches for k in batch if read_settings(paths[k]) != wanted[k]}
    batches = [batch for batch in batches if missing.intersection(batch)]
    with _progress(sum(map(len, batches)), label, shown=shown) as bar:
        for batch in batches:
            stopping.check()
            for index, pixels in zip(batch, sample(batch), strict=True):
                if index in missing:
                    said = {KEY: json.dumps(wanted[index], sort_keys=True), **texts(index)}
                    write_png(paths[index], pixels, said)
            bar.update(len(batch))


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings a picture was made with, or None if it is absent, damaged or not ours."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return json.loads(image.info[KEY])
    except (OSError, KeyError, SyntaxError, ValueError):
        return None


def weights(pipeline: Any) -> dict[str, str]:
    """A fingerprint of each part that makes the picture, with its adapters and their scales."""
    from train.models import fingerprint

    parts = ("text_encoder", "unet", "vae")
    return {part: fingerprint(getattr(pipeline, part)) for part in parts} | {
        "adapters": _adapters([getattr(pipeline, part) for part in parts])
    }


def scheduler_settings(pipeline: Any) -> dict[str, Any]:
    """The scheduler's class and its settings, without the ones that name a library or a path."""
    config = json.loads(pipeline.scheduler.to_json_string())
    return {k: config[k] for k in sorted(config) if k == "_class_name" or not k.startswith("_")}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to uint8, rounded: flooring darkens by half a level, which FID can see."""
    return np.rint(np.asarray(images, dtype=np.float64).clip(0, 1) * 255).astype(np.uint8)


def of_one_colour(paths: Sequence[Path]) -> list[str]:
    """The names of the pictures that are black, or of any one colour, all over."""
    from PIL import Image

    def is_flat(path: Path) -> bool:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (h, w, 3)
            return bool((pixels == pixels[0, 0]).all())

    with ThreadPoolExecutor() as pool:
        flat = pool.map(is_flat, paths)
        return [path.name for path, yes in zip(paths, flat, strict=True) if yes]


def finite_uint8(images: np.ndarray, batch: Sequence[tuple[str, int]]) -> np.ndarray:
    """Floats (B, H, W, 3) in [0, 1] to uint8. Raises NotFinite with the prompt and seed, as `batch`
    has them, of a picture whose pixels are not numbers."""
    for (prompt, seed), image in zip(batch, images, strict=True):
        if not np.isfinite(image).all():
            raise NotFinite(prompt, seed)
    return to_uint8(images)


def cut(keys: Sequence[K], batch_size: int) -> list[list[int]]:
    """The indices of all pictures in batches, so many of one key, its size say, to a batch. Keys
    can be sorted."""
    alike: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        alike.setdefault(key, []).append(index)
    return [
        alike[key][start : start + batch_size]
        for key in sorted(alike)
        for start in range(0, len(alike[key]), batch_size)
    ]


def write_png(path: Path, pixels: np.ndarray, texts: dict[str, str]) -> None:
    """A picture of pixels uint8 (H, W, 3) with texts by keyword, whole or not at all."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    with whole(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)


def _sample(pipeline: Any, batch: list[dict[str, Any]]) -> np.ndarray:
    import torch

    first = batch[0]
    images = pipeline(
        [item["prompt"] for item in batch],
        negative_prompt=[first.get("negative_prompt", "")] * len(batch),
        width=first["size"][0],
        height=first["size"][1],
        num_inference_steps=first["steps"],
        guidance_scale=first["guidance"],
        generator=[torch.Generator("cpu").manual_seed(item["seed"]) for item in batch],
        output_type="np",
    ).images  # (B, H, W, 3)
    return finite_uint8(images, [(item["prompt"], item["seed"]) for item in batch])


def _adapters(modules: Sequence[Any]) -> str:
    """The weights do not say how strongly an adapter acts, or whether it does."""
    digest = hashlib.sha256()
    for name, layer in (item for module in modules for item in module.named_modules()):
        if getattr(layer, "lora_A", None) is not None:
            scales = sorted((str(key), float(value)) for key, value in layer.scaling.items())
            off = layer.merged or layer.disable_adapters
            digest.update(f"{name} {list(layer.active_adapters)} {scales} {off};".encode())
    return digest.hexdigest()[:16]


def _one_each(size: Any, count: int) -> list[Size]:
    one = len(size) == 2 and isinstance(size[0], int)
    return [tuple(size)] * count if one else [tuple(each) for each in size]


def _progress(total: int, label: str, *, shown: bool) -> Any:
    return screens.bar(total, label, unit="pictures", shown=shown and total > 0, leave=True)
