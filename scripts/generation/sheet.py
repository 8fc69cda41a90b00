"""The contact sheet: all pictures of a command on one, prompts down, seeds across."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from eval.generation import KEY

NAME = "grid.png"
_CELL = 384  # pixels of a picture's longer side, at most
_MOST = 60_000_000  # pixels of a sheet
_GAP, _LABEL, _LINE, _TEXT = 8, 160, 15, 12


def write(
    output: Path, pictures: Sequence[Path], rows: Sequence[str], labels: Sequence[str]
) -> Path:
    """Writes output/grid.png of pictures that go round the rows; `labels`: one below each."""
    columns = math.ceil(len(pictures) / len(rows))
    scale, (width, height) = _cell(pictures, len(rows) * columns)
    pitch = (width + _GAP, height + _LINE + _GAP)
    size = (_LABEL + columns * pitch[0] + _GAP, len(rows) * pitch[1] + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for y, row in enumerate(rows):
        lines = textwrap.wrap(row, 24, max_lines=max(1, height // _LINE), placeholder=" ...")
        draw.text((_GAP, y * pitch[1] + _GAP), "\n".join(lines), "black", font)
    for index, path in enumerate(pictures):
        x = _LABEL + index // len(rows) * pitch[0]
        y = index % len(rows) * pitch[1] + _GAP
        with Image.open(path) as picture:
            small = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            sheet.paste(picture.convert("RGB").resize(small, Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + height + 1), labels[index], "black", font)
    file, info = output / NAME, PngInfo()
    info.add_text(KEY, '{"mode": "sheet"}')
    sheet.save(file, pnginfo=info)
    return file


def _cell(pictures: Sequence[Path], count: int) -> tuple[float, tuple[int, int]]:
    """By how much pictures are made smaller, and the size (width, height) of the largest then."""
    sizes = []
    for path in pictures:
        with Image.open(path) as picture:
            sizes.append(picture.size)
    width, height = max(size[0] for size in sizes), max(size[1] for size in sizes)
    scale = min(1.0, _CELL / max(width, height), math.sqrt(_MOST / (count * width * height)))
    return scale, (math.ceil(width * scale), math.ceil(height * scale))
