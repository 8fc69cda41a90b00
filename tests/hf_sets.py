"""Small Hugging Face datasets for tests, made with the library itself."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def picture(width: int = 40, orientation: int = 1) -> bytes:
    """A JPEG of `width` x 30 as stored; no two widths have the same bytes."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (width, 30), (width % 256, 90, 9)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def dataset(count: int = 3, *, first: int = 40, **columns: Sequence[Any]) -> Any:
    """Rows with `image`, of widths `first` and up, and `text`; or the columns given."""
    import datasets

    made: dict[str, Sequence[Any]] = {
        "image": [{"bytes": picture(first + at), "path": None} for at in range(count)],
        "text": [f"picture {first + at}" for at in range(count)],
    }
    rows = made | columns
    kinds = {name: datasets.Image() for name in rows if name.startswith("image")}
    known = datasets.Dataset.from_dict({k: v for k, v in rows.items() if k not in kinds}).features
    return datasets.Dataset.from_dict(dict(rows), features=datasets.Features({**known, **kinds}))


def parquet(folder: Path, *sizes: int, split: str = "train", first: int = 40) -> Path:
    """A folder of parquet files as the hub has them, with so many rows each."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for at, size in enumerate(sizes):
        name = f"{split}-{at:05d}-of-{len(sizes):05d}.parquet"
        dataset(size, first=first + sum(sizes[:at])).to_parquet(folder / "data" / name)
    return folder


def loaded_before(cache: Path, folder: Path, owner: str, name: str) -> str:
    """Leaves a parquet folder in the library's cache as a dataset on the hub that was loaded
    before, so that it is found without a network; how it is called."""
    import datasets

    made = datasets.load_dataset_builder(str(folder))
    made.download_and_prepare()
    there = cache / f"{owner}___{name}" / "default" / "0.0.0" / "0123456789abcdef"
    shutil.copytree(made.cache_dir, there)
    for file in there.glob("*.arrow"):
        file.rename(there / file.name.replace(folder.name, name, 1))
    return f"hf:{owner}/{name}"
