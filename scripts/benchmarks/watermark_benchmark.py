"""What the invisible watermark survives, of pictures that are easy and hard to mark, and how often
one is found where there is none."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data import toy
from data.counter import generator
from eval import watermark
from scripts.benchmarks.measuring import seconds, spread

PAYLOAD = b"toy1"
Results = dict[str, dict[str, Any]]
Picture = np.ndarray


class Scale(NamedTuple):
    """Sides in pixels, and pictures of each."""

    sides: tuple[int, ...]
    pictures: int


FULL = Scale((128, 256, 512, 768), 20)
QUICK = Scale((128, 256), 4)


def jpeg(pixels: Picture, quality: int = 75) -> Picture:
    """Compressed, with the colours at half resolution as is usual."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def resized(pixels: Picture, factor: float = 0.75) -> Picture:
    height, width = (round(side * factor) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def cropped(pixels: Picture, share: float = 0.1) -> Picture:
    """That share less on both sides, most of it at the right and at the top."""
    height, width = pixels.shape[:2]
    down, right = int(height * share * 0.63), int(width * share * 0.37)
    return pixels[down : down + round(height * (1 - share)), right : right + round(width * 0.9)]


ATTACKS: dict[str, Callable[[Picture], Picture]] = {
    "none": lambda pixels: pixels,
    "JPEG 75": jpeg,
    "resize 0.75": resized,
    "crop 10 %": cropped,
    "resize, JPEG 75": lambda pixels: jpeg(resized(pixels)),
    "crop, JPEG 75": lambda pixels: jpeg(cropped(pixels)),
}


def drawn(count: int, side: int) -> Iterable[Picture]:
    """The toy world's pictures, in all its styles: flat, with sharp edges and periods."""
    styles = (None, *toy.STYLES)
    for index in range(count):
        scene = toy.sample_scene(5, index, width=side, height=side)
        yield toy.render(scene, side, side, style=styles[index % len(styles)])


def textured(count: int, side: int) -> Iterable[Picture]:
    """A photograph's spectrum and nothing flat: noise of a power that falls with the square of the
    frequency, 45 levels deep."""
    for index in range(count):
        random = generator(0, "watermark benchmark", index)
        spectrum = np.fft.rfft2(random.standard_normal((side, side)))
        frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
        frequency[0, 0] = 1
        noise = np.fft.irfft2(spectrum / frequency, (side, side))
        luma = 128 + 45 * noise / noise.std()
        colours = luma[..., None] + 10 * random.standard_normal(3)
        yield np.clip(colours, 0, 255).astype(np.uint8)


KINDS: dict[str, Callable[[int, int], Iterable[Picture]]] = {"drawn": drawn, "textured": textured}


def measure(parts: Sequence[str], scale: Scale) -> Results:
    """The results of each kind of pictures by its name."""
    return {part: _of_kind(KINDS[part], scale) for part in parts}


def _of_kind(kind: Callable[[int, int], Iterable[Picture]], scale: Scale) -> dict[str, Any]:
    return {"pictures": scale.pictures} | {
        str(side): _of_side(list(kind(scale.pictures, side))) for side in scale.sides
    }


def _of_side(pictures: Sequence[Picture]) -> dict[str, Any]:
    marked = [watermark.embed(pixels, PAYLOAD) for pixels in pictures]
    unmarked = [watermark.examine(pixels) for pixels in pictures]
    return {
        "decibels": spread([decibels(a, b) for a, b in zip(pictures, marked, strict=True)]),
        "attacks": {name: _after(attack, marked) for name, attack in ATTACKS.items()},
        "false": sum(found.payload is not None for found in unmarked),
        "unmarked_score": spread([found.score for found in unmarked]),
        "seconds": {
            "embed": seconds(lambda: watermark.embed(pictures[0], PAYLOAD)),
            "detect": seconds(lambda: watermark.detect(marked[0])),
            "search": seconds(lambda: watermark.detect(pictures[0])),
        },
    }


def _after(attack: Callable[[Picture], Picture], marked: Sequence[Picture]) -> dict[str, Any]:
    found = [watermark.examine(attack(pixels)) for pixels in marked]
    return {
        "found": sum(one.payload == PAYLOAD for one in found) / len(found),
        "bits": sum(_right_bits(one.read) for one in found) / len(found),
        "score": spread([one.score for one in found]),
    }


def _right_bits(read: bytes) -> float:
    """The share of the payload's bits that were read rightly; half of them is chance."""
    wrong = np.unpackbits(np.frombuffer(read[: len(PAYLOAD)], np.uint8))
    return float((wrong == np.unpackbits(np.frombuffer(PAYLOAD, np.uint8))).mean())


def decibels(one: Picture, other: Picture) -> float:
    """Peak signal-to-noise ratio."""
    error = np.square(one.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / error))


def table(results: Results) -> str:
    """The results as Markdown."""
    rows = [("pictures", "dB", *ATTACKS, "without mark"), ("---",) * (len(ATTACKS) + 3)]
    for kind, result in results.items():
        for side, measured in result.items():
            if side != "pictures":
                rows.append(_row(f"{kind}, {side} px", result["pictures"], measured))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, count: int, measured: dict[str, Any]) -> tuple[str, ...]:
    attacks = [
        f"{100 * one['found']:.0f} % ({100 * one['bits']:.0f} %)"
        for one in measured["attacks"].values()
    ]
    quality = f"{measured['decibels']['min']:.1f}"
    return (name, quality, *attacks, f"{measured['false']} of {count}")
