"""Every kind of bad or unusual input that a folder of pictures can hold, one file each.

What can be read comes with the pixels that it must be read as, worked out here and not by the
library that reads them; the rest with words that the reason for refusing it must hold.
"""

from __future__ import annotations

import io
import json
import os
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features

EXACT, LOSSY = 0, 4  # largest difference of any channel, of 255
COLOURS = [(250, 0, 0), (0, 200, 0), (0, 0, 250), (240, 240, 240)]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@dataclass(frozen=True)
class Expected:
    """What must become of one file: `pixels`, or else a refusal whose reason holds `words`."""

    pixels: np.ndarray | None = None  # (h, w, 3) uint8, upright sRGB, transparency on white
    tolerance: int = EXACT
    words: str = ""


Kind = tuple[bytes, Expected]


def write_all(folder: Path) -> dict[str, Expected]:
    """Fills `folder`/sidecars and `folder`/listed; what is to be expected, by path or line below
    `folder`. Beside them lies `folder`/outside, from which nothing may ever be read."""
    (folder / "outside").mkdir(parents=True)
    (folder / "outside" / "secret.png").write_bytes(encode(quarters()))
    (folder / "outside" / "secret.txt").write_text("secret")
    expected = {f"sidecars/{name}": kind for name, kind in _sidecars(folder / "sidecars").items()}
    return expected | {f"listed/{name}": kind for name, kind in _listed(folder / "listed").items()}


def quarters(colours: Sequence[Sequence[int]] = COLOURS, dtype: type = np.uint8) -> np.ndarray:
    """(48, 64, channels): four quarters that tell every orientation apart. Their sides are
    multiples of 16, so that JPEG keeps them flat."""
    top_left, top_right, bottom_left, bottom_right = np.asarray(colours, dtype=dtype)
    pixels = np.empty((48, 64, len(top_left)), dtype)
    pixels[:24, :32], pixels[:24, 32:] = top_left, top_right
    pixels[24:, :32], pixels[24:, 32:] = bottom_left, bottom_right
    return pixels


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A file of that kind; JPEG and its like at a high quality."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    quality = {"quality": 95, "subsampling": 0} if kind in ("JPEG", "MPO") else {}
    file = io.BytesIO()
    image.save(file, kind, **(quality | options))  # type: ignore[arg-type]
    return file.getvalue()


@cache
def kinds() -> dict[str, Kind]:
    """The files that are plain bytes: name, content and what becomes of it."""
    return _whole() | _turned() | _deep() | _transparent() | _inks() | _profiles() | _damaged()


def _read(content: bytes, pixels: np.ndarray | None = None, tolerance: int = EXACT) -> Kind:
    return content, Expected(quarters() if pixels is None else pixels, tolerance)


def _refused(content: bytes, words: str) -> Kind:
    return content, Expected(words=words)


# What can be read ----------------------------------------------------------------------------


def _whole() -> dict[str, Kind]:
    other = Image.new("RGB", (64, 48), (9, 9, 9))
    frames = {"save_all": True, "append_images": [other]}
    grey = quarters([(0,), (90,), (180,), (255,)])
    found = {
        "png-named.jpg": _read(encode(quarters())),
        "grey.png": _read(encode(grey[..., 0]), grey.repeat(3, axis=2)),
        "palette.png": _read(encode(Image.fromarray(quarters()).quantize(8))),
        "animated-gif.gif": _read(encode(quarters(), "GIF", **frames), tolerance=LOSSY),
        "animated-webp.webp": _read(encode(quarters(), "WEBP", lossless=True, **frames)),
        "animated.png": _read(encode(quarters(), "PNG", **frames)),
        "two-pictures.jpg": _read(encode(quarters(), "MPO", **frames), tolerance=LOSSY),
    }
    if features.check("avif"):
        content = encode(quarters(), "AVIF", quality=95, subsampling="4:4:4")
        found["picture.avif"] = _read(content, tolerance=3 * LOSSY)
    return found


def _turned() -> dict[str, Kind]:
    return {
        f"orientation-{value}-{suffix}.{suffix}": _read(
            encode(_stored(quarters(), value), kind, exif=_exif(value)), tolerance=tolerance
        )
        for value in range(1, 9)
        for suffix, kind, tolerance in (("jpg", "JPEG", LOSSY), ("png", "PNG", EXACT))
    }


def _stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a camera stores it (EXIF 2.32, 4.6.4 A): which sides of the upright picture its first
    row and first column are."""
    turned = [
        upright,  # top, left
        upright[:, ::-1],  # top, right
        upright[::-1, ::-1],  # bottom, right
        upright[::-1],  # bottom, left
        upright.swapaxes(0, 1),  # left, top
        upright[:, ::-1].swapaxes(0, 1),  # right, top
        upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        upright[::-1].swapaxes(0, 1),  # left, bottom
    ]
    return np.ascontiguousarray(turned[orientation - 1])


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _deep() -> dict[str, Kind]:
    grey = quarters([(0,), (20000,), (40000,), (65535,)], np.uint16)
    colour = quarters([(65535, 0, 1000), (300, 50000, 0), (0, 0, 60000), (61000,) * 3], np.uint16)
    veiled = np.concatenate([colour, np.full_like(colour[..., :1], 65535)], axis=2)
    grey8, colour8 = (np.rint(deep / 257).astype(np.uint8) for deep in (grey, colour))
    return {
        "grey-16.png": _read(encode(grey[..., 0]), grey8.repeat(3, axis=2), 1),
        "grey-16-tif.tif": _read(encode(grey[..., 0], "TIFF"), grey8.repeat(3, axis=2), 1),
        "colour-16.png": _read(_png(64, 48, 16, 2, colour.astype(">u2").tobytes()), colour8, 1),
        "inverted-16.tif": _read(
            _tiff(64, 48, 16, 0, (65535 - grey).astype("<u2").tobytes()), grey8.repeat(3, axis=2), 1
        ),
        "grey-12.tif": _read(_tiff(64, 48, 12, 1, _in_12_bits(grey)), grey8.repeat(3, axis=2), 1),
        "alpha-16.png": _read(_png(64, 48, 16, 6, veiled.astype(">u2").tobytes()), colour8, 1),
    }


def _png(
    width: int, height: int, depth: int, colour: int, samples: bytes, *before: tuple[bytes, bytes]
) -> bytes:
    """A PNG by hand (its specification, 5 and 11.2), for what Pillow cannot write.
    `before`: chunks that stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    row = len(samples) // height
    filtered = b"".join(b"\0" + samples[at * row : (at + 1) * row] for at in range(height))
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(filtered)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _in_12_bits(grey: np.ndarray) -> bytes:
    one, other = (grey.ravel() >> 4).reshape(-1, 2).T
    packed = [one >> 4, (one & 15) << 4 | other >> 8, other & 255]
    return np.stack(packed, axis=1).astype(np.uint8).tobytes()


def _tiff(width: int, height: int, depth: int, photometric: int, samples: bytes) -> bytes:
    """A grey TIFF by hand (TIFF 6.0, sections 2 and 4)."""
    tags = {256: width, 257: height, 258: depth, 259: 1, 262: photometric, 273: 122, 277: 1}
    tags |= {278: height, 279: len(samples)}  # the pixels in one strip, at byte 8 + 2 + 9 * 12 + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + samples


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def _transparent() -> dict[str, Kind]:
    veiled = quarters([(*colour, 85 * at) for at, colour in enumerate(COLOURS)])
    palette = Image.fromarray(quarters()).quantize(8)
    hole = quarters([(255, 255, 255), *COLOURS[1:]])
    grey = quarters([(30, 0), (90, 64), (180, 128), (255, 255)])
    opacity = {"transparency": palette.getpixel((0, 0))}
    return {
        "alpha.png": _read(encode(veiled), _on_white(veiled), 1),
        "alpha-webp.webp": _read(
            encode(veiled, "WEBP", lossless=True, exact=True), _on_white(veiled), 1
        ),
        **_clear_greys(),
        "alpha-grey.png": _read(encode(Image.fromarray(grey, "LA")), _on_white(grey), 1),
        "palette-hole.png": _read(encode(palette, "PNG", **opacity), hole),
        "palette-hole-gif.gif": _read(encode(palette, "GIF", **opacity), hole),
    }


def _clear_greys() -> dict[str, Kind]:
    """Four greys of which the second is transparent, in two bits and in four."""
    pixels = np.array([0, 255, 170, 255], np.uint8).reshape(1, 4, 1).repeat(3, axis=2)
    return {
        f"grey-{depth}-hole.png": _read(_png(4, 1, depth, 0, packed, (b"tRNS", clear)), pixels)
        for depth, packed, clear in ((2, b"\x1b", b"\0\1"), (4, b"\x05\xaf", b"\0\5"))
    }


def _on_white(veiled: np.ndarray) -> np.ndarray:
    alpha = veiled[..., -1:] / 255
    flat = np.rint(veiled[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return flat if flat.shape[2] == 3 else flat.repeat(3, axis=2)


# Four inks -----------------------------------------------------------------------------------

INKS = [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 128)]


def _inks() -> dict[str, Kind]:
    inks = quarters(INKS)
    cyan, magenta, yellow, black = np.split(inks / 255, 4, axis=2)
    light = np.concatenate([1 - cyan, 1 - magenta, 1 - yellow], axis=2) * (1 - black)
    plain = np.rint(255 * light).astype(np.uint8)
    printed = quarters([(255, 0, 0), (0, 255, 0), (0, 0, 255), (119, 119, 119)])
    image = Image.fromarray(inks, "CMYK")
    return {
        "inks.tif": _read(encode(image, "TIFF"), plain, 1),
        # Adobe stores inks inverted and leaves its marker; the common readers take all as inverted.
        "inks-adobe.jpg": _read(encode(image, "JPEG"), plain, LOSSY),
        "inks-unmarked.jpg": _read(_without(encode(image, "JPEG"), 0xEE), plain, LOSSY),
        "inks-profile.jpg": _read(encode(image, "JPEG", icc_profile=press()), printed, 12),
        "inks-profile-tif.tif": _read(encode(image, "TIFF", icc_profile=press()), printed, 12),
    }


def _without(jpeg: bytes, marker: int) -> bytes:
    """The JPEG without its segments of that marker."""
    at, kept = 2, jpeg[:2]
    while jpeg[at + 1] != 0xDA:
        length = 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        kept += b"" if jpeg[at + 1] == marker else jpeg[at : at + length]
        at += length
    return kept + jpeg[at:]


@cache
def press() -> bytes:
    """An ICC profile of a press whose cyan ink is red, whose magenta is green and whose yellow is
    blue, so that a reader who passes it over shows (ICC.1:2001-04, 6.5.8: lut8Type)."""
    paper, dark = (100.0, 0.0, 0.0), (0.0, 0.0, 0.0)
    red, green, blue = (54.3, 80.8, 69.9), (87.8, -79.3, 81.0), (29.6, 68.3, -112.0)  # L*a*b*, D50
    table = b""
    for cyan, magenta, yellow, black in np.ndindex(2, 2, 2, 2):
        inked = red if cyan else green if magenta else blue if yellow else paper
        lightness, *tint = dark if black else inked
        table += bytes([round(lightness * 2.55), *(round(value) + 128 for value in tint)])
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if at % 4 == 0 else 0 for at in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + 4 * ramp + table + 3 * ramp
    white = b"XYZ \0\0\0\0" + _xyz(0.9642, 1.0, 0.8249)
    return _profile(b"prtrCMYKLab ", {b"A2B0": lut, b"wtpt": white})


def _profile(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Header, table of tags and tags of an ICC profile (ICC.1:2001-04, 6.1 to 6.3)."""
    start = 132 + 12 * len(tags)
    index, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        index += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    white = _xyz(0.9642, 1.0, 0.8249)
    head = struct.pack(">I4sI", start + len(body), b"lcms", 0x02400000) + kind + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + white.ljust(60, b"\0") + index + body


def _xyz(*values: float) -> bytes:
    return struct.pack(">3i", *(round(65536 * value) for value in values))


# Profiles ------------------------------------------------------------------------------------

# Primaries of Display P3 and of sRGB, adapted to D50, in columns.
P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
REC_709 = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def _profiles() -> dict[str, Kind]:
    muted = quarters([(180, 90, 90), (90, 170, 100), (80, 90, 190), (200, 200, 200)])
    seen = _encoded(_linear(muted) @ (np.linalg.inv(REC_709) @ P3).T)
    wide = display(P3)
    grey = quarters([(10,), (60,), (130,), (255,)])
    seen_grey = _encoded(grey / 255).repeat(3, axis=2)
    linear = _profile(
        b"mntrGRAYXYZ ",
        {
            b"wtpt": b"XYZ \0\0\0\0" + _xyz(0.9642, 1.0, 0.8249),
            b"kTRC": b"curv" + bytes(8),
        },
    )
    exchanged = quarters([COLOURS[at] for at in (1, 0, 2, 3)])[..., [1, 0, 2]]
    return {
        "srgb.png": _read(encode(quarters(), icc_profile=SRGB), tolerance=1),
        "wide.png": _read(encode(muted, icc_profile=wide), seen, 2),
        "wide-jpg.jpg": _read(encode(muted, "JPEG", icc_profile=wide), seen, LOSSY),
        "exchanged.png": _read(
            encode(exchanged, icc_profile=display(REC_709[:, [1, 0, 2]])),
            quarters([COLOURS[at] for at in (1, 0, 2, 3)]),
            2,
        ),
        "wide-alpha.png": _read(encode(_opaque(muted), icc_profile=wide), seen, 2),
        "wide-palette.png": _read(
            encode(Image.fromarray(muted).quantize(8), icc_profile=wide), seen, 3
        ),
        "linear-grey.png": _read(encode(grey[..., 0], icc_profile=linear), seen_grey, 2),
        "broken-profile.png": _read(encode(quarters(), icc_profile=b"no profile")),
        "cut-profile.png": _read(encode(quarters(), icc_profile=SRGB[:300])),
        "foreign-profile.png": _read(encode(quarters(), icc_profile=press())),
    }


def _opaque(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)


def display(primaries: np.ndarray) -> bytes:
    """An ICC profile of a display with sRGB's curve and these primaries (columns, XYZ at D50)."""
    curve = np.rint(_linear(np.arange(256, dtype=np.uint8)) * 65535).astype(">u2").tobytes()
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _xyz(0.9642, 1.0, 0.8249)}
    for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + _xyz(*column)
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">I", 256) + curve
    return _profile(b"mntrRGB XYZ ", tags)


def _linear(values: np.ndarray) -> np.ndarray:
    share = values / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def _encoded(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    share = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * share).astype(np.uint8)


# What is damaged -----------------------------------------------------------------------------


def _damaged() -> dict[str, Kind]:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    photo, drawing = encode(noise, "JPEG"), encode(noise)
    broken_exif = b"Exif\0\0II*\0\xff\xff\xff\xff broken"
    heic = struct.pack(">I", 24) + b"ftypheic\0\0\0\0heicmif1" + bytes(400)
    bomb = _png(60_000, 60_000, 8, 2, b"")
    middle = len(drawing) // 2  # of the zlib stream
    flipped = drawing[:middle] + bytes(255 - at for at in drawing[middle : middle + 2])
    flipped += drawing[middle + 2 :]
    clear = (b"tRNS", struct.pack(">3H", 0, 0, 0))
    return {
        "broken-exif.jpg": _read(encode(quarters(), "JPEG", exif=broken_exif), tolerance=LOSSY),
        "orientation-unknown.jpg": _read(
            encode(quarters(), "JPEG", exif=_exif(77)), tolerance=LOSSY
        ),
        "empty.jpg": _refused(b"", "is empty"),
        "cut.jpg": _refused(photo[: len(photo) // 2], "truncated"),
        "cut-png.png": _refused(drawing[: len(drawing) // 2], "truncated"),
        "flipped-png.png": _refused(flipped, "cannot be decoded"),
        "colour-16-hole.png": _refused(_png(1, 1, 16, 2, bytes(6), clear), "alpha"),
        "text.jpg": _refused(b"This is a text, whatever its name says.\n", "not a picture"),
        "page.jpg": _refused(b"<!doctype html><title>404 Not Found</title>", "not a picture"),
        "postscript.png": _refused(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a pic"
        ),
        "telephone.heic": _refused(heic, "HEIC"),
        "telephone-named.jpg": _refused(heic, "not a picture"),
        "bomb.png": _refused(bomb, "pixels"),
        "floating.tif": _refused(encode(Image.new("F", (64, 48)), "TIFF"), "8-bit"),
    }


# Folders of them -----------------------------------------------------------------------------


def _sidecars(folder: Path) -> dict[str, Expected]:
    """The pictures with a caption beside each, and all that only a file system can hold."""
    folder.mkdir()
    expected = {}
    for name, (content, kind) in kinds().items():
        _write(folder / name, content)
        expected[name] = kind
    return expected | _names(folder) | _captions(folder) | _traps(folder)


def _write(path: Path, content: bytes, caption: bytes | None = b"a picture") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)


def _names(folder: Path) -> dict[str, Expected]:
    content, fine = encode(quarters()), Expected(quarters())
    composed, split = "caf\u00e9", unicodedata.normalize("NFD", "na\u00efve")
    for name in (composed, split, "new\nline", 'quote\'s "and" <b>&amp;', "directory.jpg/inside"):
        _write(folder / f"{name}.png", content)
    both = "\u00fcber"
    for form in ("NFC", "NFD"):
        _write(folder / f"{unicodedata.normalize(form, both)}.png", content)
    _write(folder / "twice.jpg", content)
    _write(folder / "twice.png", content)
    _write(folder / "CAPITALS.PNG", content)
    return {
        f"{composed}.png": fine,
        f"{unicodedata.normalize('NFC', split)}.png": fine,
        "new\nline.png": fine,
        'quote\'s "and" <b>&amp;.png': fine,
        "directory.jpg/inside.png": fine,
        "CAPITALS.PNG": fine,
        "twice.jpg": fine,
        "twice.png": Expected(words="twice.txt"),
        f"{both}.png": Expected(words="Unicode"),
        f"{both}.txt": Expected(words="Unicode"),
    }


def _captions(folder: Path) -> dict[str, Expected]:
    texts = {
        "no-caption": (None, "no caption"),
        "empty-caption": (b" \n\t\n", "no caption"),
        "latin-caption": ("caf\u00e9".encode("latin-1"), "UTF-8"),
        "marked-caption": (b"\xef\xbb\xbfa picture", None),
    }
    for name, (text, _) in texts.items():
        _write(folder / f"{name}.png", encode(quarters()), text)
    return {
        f"{name}.png": Expected(quarters()) if words is None else Expected(words=words)
        for name, (_, words) in texts.items()
    }


def _traps(folder: Path) -> dict[str, Expected]:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link-out.png").symlink_to(folder.parent / "outside" / "secret.png")
    (folder / "link-loop.png").symlink_to("link-loop.png")
    (folder / "link-nowhere.png").symlink_to("nowhere.png")
    (folder / "folder-loop").symlink_to(".")
    (folder / "folder-out").symlink_to(folder.parent / "outside")
    for name in ("pipe", "link-out", "link-loop", "link-nowhere"):
        (folder / f"{name}.txt").write_text("a picture")
    return {
        "pipe.jpg": Expected(words="not a regular file"),
        "link-out.png": Expected(words="outside"),
        "link-loop.png": Expected(words="cannot be reached"),
        "link-nowhere.png": Expected(words="cannot be reached"),
        "folder-loop": Expected(words="not followed"),
        "folder-out": Expected(words="not followed"),
    }


def _listed(folder: Path) -> dict[str, Expected]:
    """A metadata.jsonl that names files it must not, and lines that are none."""
    folder.mkdir()
    _write(folder / "good.png", encode(quarters()), None)
    secret = folder.parent / "outside" / "secret.png"
    refused = [
        (_line("../outside/secret.png"), "below the folder"),
        (_line("a/../../outside/secret.png"), "below the folder"),
        (_line(str(secret)), "below the folder"),
        (_line(secret.as_uri()), "below the folder"),
        (_line("..\\outside\\secret.png"), "below the folder"),
        (_line("missing.png"), "not in the folder"),
        (_line("good.png"), "second time"),
        (b'{"file_name": ', "JSON"),
        (b'{"file_name": "good.png", "text": "caf\xe9"}', "UTF-8"),
    ]
    lines = [_line("good.png"), *(line for line, _ in refused)]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return {"good.png": Expected(quarters())} | {
        f"metadata.jsonl:{number}": Expected(words=words)
        for number, (_, words) in enumerate(refused, start=2)
    }


def _line(file_name: str) -> bytes:
    return json.dumps({"file_name": file_name, "text": "a picture"}).encode()
