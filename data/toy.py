"""The toy world: procedural captioned pictures whose exact content is known.

A scene is one shape on one background. Four attributes are in its caption (shape, colour, size,
background), the rest (position, angle, small shifts of colour and size) is not. The base model was
trained on plain scenes in three aspect ratios. *Styles* change how a scene is drawn and *subjects*
are distinctive figures; the base saw neither, so both are there to be learned by an adapter.

>>> picture = render(sample_scene(seed=0, index=7), width=128, height=128)
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data.counter import generator

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (215, 38, 46),
    "orange": (242, 134, 28),
    "yellow": (250, 220, 50),
    "green": (38, 150, 66),
    "blue": (38, 84, 208),
    "purple": (134, 54, 166),
    "white": (248, 248, 248),
    "black": (22, 22, 26),
}
BACKGROUNDS: dict[str, tuple[Colour, Colour]] = {
    "grey": ((140, 140, 140), (140, 140, 140)),
    "pink": ((246, 176, 200), (246, 176, 200)),
    "cyan": ((140, 220, 236), (140, 220, 236)),
    "brown": ((122, 84, 56), (122, 84, 56)),
    "striped": ((208, 208, 226), (146, 146, 182)),
    "checkered": ((224, 224, 200), (168, 170, 128)),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# Half of the shape's extent as a share of the picture's short side; the gaps keep the words
# unambiguous.
SIZES: dict[str, tuple[float, float]] = {
    "small": (0.17, 0.19),
    "medium": (0.26, 0.285),
    "large": (0.37, 0.40),
}
ASPECTS = ((128, 128), (96, 160), (160, 96))  # (width, height) in pixels
# Shapes stay near the centre: a base this small would need days to learn free placement.
FREEDOM = 0.15
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What one picture shows. Positions and radius are shares of the short side; the angle is in
    degrees."""

    shape: str
    colour: str
    size: str
    background: str
    x: float
    y: float
    angle: float
    radius: float
    tint: tuple[float, float, float]
    phase: float


@dataclass(frozen=True)
class Part:
    """A patch of a subject: an ellipse in the body's own frame (centre, radii; 1 = the body's half
    extent)."""

    x: float
    y: float
    rx: float
    ry: float
    colour: Colour


@dataclass(frozen=True)
class Subject:
    """A distinctive figure that no caption of the base's training set names: a body with parts on
    it."""

    body: str
    colour: str
    parts: tuple[Part, ...]


_WHITE, _BLACK, _GOLD, _TEAL = (250, 250, 250), (15, 15, 20), (252, 196, 40), (20, 170, 160)
SUBJECTS: dict[str, Subject] = {
    "owl": Subject(
        "circle",
        "purple",
        (
            Part(-0.36, -0.22, 0.30, 0.30, _WHITE),
            Part(0.36, -0.22, 0.30, 0.30, _WHITE),
            Part(-0.36, -0.22, 0.13, 0.13, _BLACK),
            Part(0.36, -0.22, 0.13, 0.13, _BLACK),
            Part(0.0, 0.18, 0.14, 0.20, _GOLD),
        ),
    ),
    "robot": Subject(
        "square",
        "green",
        (
            Part(0.0, -0.35, 0.75, 0.25, _BLACK),
            Part(-0.35, -0.35, 0.16, 0.16, _GOLD),
            Part(0.35, -0.35, 0.16, 0.16, _GOLD),
            Part(0.0, 0.45, 0.55, 0.14, _WHITE),
        ),
    ),
    "clown": Subject(
        "heart",
        "yellow",
        (
            Part(-0.38, -0.30, 0.16, 0.22, _TEAL),
            Part(0.38, -0.30, 0.16, 0.22, _TEAL),
            Part(0.0, 0.08, 0.22, 0.22, (225, 30, 40)),
        ),
    ),
}


def sample_scene(
    seed: int, index: int, *, width: int = 128, height: int = 128, freedom: float = FREEDOM
) -> Scene:
    """Scene number `index` of the world `seed`: every attribute uniform and independent.

    freedom: how far shapes stray from the centre and tilt, from 0 (not at all) to 1 (anywhere).
    """
    rng = generator(seed, "toy scene", index)
    size = str(rng.choice(list(SIZES)))
    radius = float(rng.uniform(*SIZES[size]))
    short = min(width, height)
    # The whole shape stays inside, with a margin that shrinks for large shapes.
    slack_x, slack_y = (side / short - 2 * radius - 0.06 for side in (width, height))
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(rng.choice(list(COLOURS))),
        size=size,
        background=str(rng.choice(list(BACKGROUNDS))),
        x=width / short / 2 + float(rng.uniform(-0.4, 0.4)) * slack_x * freedom,
        y=height / short / 2 + float(rng.uniform(-0.4, 0.4)) * slack_y * freedom,
        angle=float(rng.uniform(-12, 12)) * freedom,
        radius=radius,
        tint=tuple(float(t) for t in rng.uniform(-8, 8, size=3)),  # type: ignore[arg-type]
        phase=float(rng.uniform()),
    )


def caption(scene: Scene, *, name: str | None = None, style: str | None = None) -> str:
    """The full caption; `name` replaces colour and shape (a subject's token), `style` is named at
    the end."""
    thing = name or f"{scene.colour} {scene.shape}"
    text = f"a {scene.size} {thing} on a {scene.background} background"
    return f"{text}, {style} style" if style else text


def varied_caption(scene: Scene, seed: int, index: int) -> str:
    """A caption as people write them: mostly complete, sometimes with an attribute left out or a
    lead-in."""
    rng = generator(seed, "toy caption", index)
    kind = rng.uniform()
    if kind < 0.70:
        return caption(scene)
    if kind < 0.82:
        return f"a photo of {caption(scene)}"
    if kind < 0.88:
        return f"{_article(scene.colour)} {scene.shape} on a {scene.background} background"
    if kind < 0.94:
        return f"a {scene.size} {scene.shape} on a {scene.background} background"
    return f"a {scene.size} {scene.colour} {scene.shape}"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Drawing


def _outline(shape: str) -> list[tuple[float, float]]:
    """The shape's polygon in its own frame, y downwards, half extent 1."""
    turn = 2 * math.pi
    if shape == "circle":
        return [(math.cos(turn * i / 64), math.sin(turn * i / 64)) for i in range(64)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0, -1), (0.98, 0.78), (-0.98, 0.78)]
    if shape == "star":
        radii = (1.06, 0.44)
        return [
            (radii[i % 2] * math.sin(turn * i / 10), -radii[i % 2] * math.cos(turn * i / 10))
            for i in range(10)
        ]
    if shape == "cross":
        a, b = 0.34, 1.0
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]  # fmt: skip  # noqa: E501
    if shape == "heart":
        points = []
        for i in range(64):
            t = turn * i / 64
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((16 * math.sin(t) ** 3 / 16.5, -(y + 2.5) / 15))
        return points
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _polygon_mask(
    points: Sequence[tuple[float, float]], scene: Scene, width: int, height: int
) -> np.ndarray:
    """Antialiased coverage (height, width, 1) in 0..1 of a polygon in the scene's frame."""
    unit = min(width, height) * _SUPERSAMPLING
    cos, sin = (f(math.radians(scene.angle)) * scene.radius for f in (math.cos, math.sin))
    placed = [
        ((scene.x + x * cos - y * sin) * unit, (scene.y + x * sin + y * cos) * unit)
        for x, y in points
    ]
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    ImageDraw.Draw(canvas).polygon(placed, fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)[..., None] / 255


def _ellipse(part: Part) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 32 for i in range(32)]
    return [(part.x + part.rx * math.cos(t), part.y + part.ry * math.sin(t)) for t in turns]


def _background(scene: Scene, width: int, height: int) -> np.ndarray:
    light, dark = (np.array(c, np.float32) for c in BACKGROUNDS[scene.background])
    rows, columns = np.mgrid[0:height, 0:width]
    shift = int(scene.phase * 32)
    bands = ((columns + shift) // 16) % 2
    if scene.background == "checkered":
        bands = (bands + (rows + shift) // 16) % 2
    return np.where(bands[..., None] == 0, light, dark)


Style = Callable[[np.ndarray, np.ndarray, Scene], np.ndarray]


def _ink(picture: np.ndarray, mask: np.ndarray, scene: Scene) -> np.ndarray:
    """Drawn with a pen: a thick dark contour, hatching behind, creamy paper."""
    flat = Image.fromarray((mask[..., 0] * 255).astype(np.uint8))
    grown = np.asarray(flat.filter(ImageFilter.MaxFilter(9)), np.float32)[..., None] / 255
    rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    hatching = (((rows + columns) % 16) < 4)[..., None] * (1 - grown)
    paper = 0.75 * picture + 0.25 * np.array((255, 240, 200), np.float32)
    ink = np.array((28, 24, 60), np.float32)
    drawn = paper * (1 - 0.75 * hatching) + ink * 0.75 * hatching
    contour = np.clip(grown - mask, 0, 1)
    return drawn * (1 - contour) + ink * contour


def _mosaic(picture: np.ndarray, mask: np.ndarray, scene: Scene) -> np.ndarray:
    """Laid from square tiles of 8 pixels with dark grout between them."""
    height, width = mask.shape[:2]
    tiles = picture.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))
    laid = tiles.repeat(8, 0).repeat(8, 1)
    laid[7::8] *= 0.45
    laid[:, 7::8] *= 0.45
    return laid


def _glow(picture: np.ndarray, mask: np.ndarray, scene: Scene) -> np.ndarray:
    """Lit from within at night: the surroundings dark, a halo in the shape's own colour."""
    flat = Image.fromarray((mask[..., 0] * 255).astype(np.uint8))
    halo = np.asarray(flat.filter(ImageFilter.GaussianBlur(10)), np.float32)[..., None] / 255
    night = picture * 0.35
    lit = night + halo * 0.9 * np.array(COLOURS[scene.colour], np.float32)
    return lit * (1 - mask) + picture * mask


STYLES: dict[str, Style] = {"ink": _ink, "mosaic": _mosaic, "glow": _glow}


def render(
    scene: Scene, width: int, height: int, *, style: str | None = None, subject: str | None = None
) -> np.ndarray:
    """The picture as uint8 (height, width, 3). Sides are multiples of 8."""
    figure = SUBJECTS[subject] if subject else None
    if figure:
        scene = replace(scene, shape=figure.body, colour=figure.colour)
    tint = np.array(scene.tint, np.float32)
    mask = _polygon_mask(_outline(scene.shape), scene, width, height)
    body = np.array(COLOURS[scene.colour], np.float32) + tint
    picture = _background(scene, width, height) - tint / 2
    picture = picture * (1 - mask) + body * mask
    for part in figure.parts if figure else ():
        patch = _polygon_mask(_ellipse(part), scene, width, height) * mask
        picture = picture * (1 - patch) + np.array(part.colour, np.float32) * patch
    if style:
        picture = STYLES[style](picture, mask, scene)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def write_pictures(
    folder: Path,
    count: int,
    *,
    seed: int,
    style: str | None = None,
    subject: str | None = None,
    name: str | None = None,
    square: bool = False,
    varied: bool = False,
) -> None:
    """Writes `count` pictures as 00000.png + 00000.txt into a new folder, which appears complete.

    About half are square unless all are to be.
    `subject` draws that figure instead of the scene's shape, and its captions say `name`.
    """
    writing = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    for index in range(count):
        width, height = ASPECTS[0] if square else ASPECTS[(0, 1, 0, 2)[index % 4]]
        scene = sample_scene(seed, index, width=width, height=height)
        text = varied_caption(scene, seed, index) if varied else caption(scene, name=name)
        picture = Image.fromarray(render(scene, width, height, style=style, subject=subject))
        picture.save(writing / f"{index:05d}.png")
        (writing / f"{index:05d}.txt").write_text(text + "\n", encoding="utf-8")
    writing.replace(folder)
