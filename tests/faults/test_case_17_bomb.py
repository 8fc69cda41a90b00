"""Case 17: a picture whose header claims 60,000 x 60,000 pixels -> it is refused before it is
decoded, and takes no more memory than none would."""

import resource
import struct
import zlib

import pytest

from tests.bad_images import _png
from tests.faults.hostile import peak, picture
from tests.faults.removals import Removal

WITHOUT = [
    Removal(
        "the number of pixels is looked at before they are decoded",
        "data/images.py",
        "MAX_PIXELS = 178_956_970\n",
        "MAX_PIXELS = 10**12\nImage.MAX_IMAGE_PIXELS = None\n",
        "header",
    ),
]
SIDE = 60_000
ROOM = 400  # MiB that a run may take more with a bomb than without; decoded, it takes 10,300


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def profile_bomb():
    """A small picture with a colour profile of 600 MB, which takes 0.6 MB in the file."""
    whole = _png(64, 64, 8, 2, bytes(64 * 64 * 3))
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(600)) + packer.flush()
    header = 8 + 25
    return whole[:header] + chunk(b"iCCP", b"x\0\0" + packed) + whole[header:]


def bombs():
    """Headers of several kinds of file."""
    bitmap = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, 0, 0, 0, 0, 0, 0)
    tags = {256: SIDE, 257: SIDE, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: SIDE, 279: 9}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return {
        "bomb-png.png": _png(SIDE, SIDE, 8, 2, b""),
        "bomb-gif.gif": b"GIF89a" + struct.pack("<HH", SIDE, SIDE) + b"\0\0\0,"
        + struct.pack("<HHHH", 0, 0, SIDE, SIDE) + b"\0\x08\0;",
        "bomb-bmp.bmp": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bitmap,
        "bomb-tif.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        picture(tmp_path / "set" / f"{number}.png", (60 * number, 90, 250 - 80 * number))
    return tmp_path / "set"


def prepare(starter, folder, output):
    limits = {resource.RLIMIT_AS: (16 << 30, 16 << 30)}  # so that no test takes the machine along
    arguments = (f"source={folder}", f"output={output}")
    return starter.start("scripts/prepare.py", *arguments, limits=limits)


@pytest.mark.slow
def test_a_bomb_is_refused_by_its_header_and_takes_no_memory(starter, folder, tmp_path):
    control = prepare(starter, folder, tmp_path / "without")
    without, _ = peak(control)
    for name, content in bombs().items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("boom")
    (folder / "profile.png").write_bytes(profile_bomb())
    (folder / "profile.txt").write_text("boom")
    run = prepare(starter, folder, tmp_path / "with")
    most, seconds = peak(run)
    assert run.codes == control.codes == [0], run.output
    lines = run.output.splitlines()
    for name in bombs():
        (line,) = (line for line in lines if line.startswith(f"cannot be used: {name}"))
        assert "pixels" in line
    assert most < without + ROOM and seconds < 30, (most, without, seconds)


def test_so_is_one_that_is_a_mask(starter, folder, tmp_path):
    (folder / "0.mask.png").write_bytes(bombs()["bomb-png.png"])
    run = starter.start(
        "scripts/prepare.py", f"source={folder}", f"output={tmp_path / 'out'}", "masks=true"
    )
    most, _ = peak(run)
    assert run.codes == [0] and "0.png: its mask 0.mask.png claims more pixels" in run.output
    assert most < 3000
