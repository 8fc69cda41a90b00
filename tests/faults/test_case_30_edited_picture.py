"""Case 30: a picture that is edited after its latents were cached, even one of the same size and
modification time -> it, and it alone, is encoded again."""

import os
import shutil

import pytest

from tests.faults.hostile import picture
from tests.faults.injected import record, recorded
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "a file is known by more than size, modification time and inode",
        "data/examine.py",
        "facts = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)",
        "facts = (status.st_mtime_ns, status.st_ino)",
    ),
    Removal(
        "latents have a key of the picture's bytes",
        "data/cache.py",
        '_key("latent", record.sha256, vae_fingerprint',
        '_key("latent", record.id, vae_fingerprint',
    ),
    Removal(
        "a picture that has the bytes it had keeps its latents",
        "data/cache.py",
        '_key("latent", record.sha256, vae_fingerprint',
        '_key("latent", record.sha256, record.modified, vae_fingerprint',
    ),
]
ENCODED = "data.cache:check_finite"  # called for each picture that was encoded, with its record


def encoded(starter, world, tmp_path, name, *more):
    """How many pictures a run encoded."""
    file = tmp_path / f"{name}.jsonl"
    how = ("train.steps=2", "preview.every=0", "validation.every=0", "data.flip=false")
    paths = (f"data.path={tmp_path / 'set'}", f"data.cache={tmp_path / 'cache'}")
    run = arguments(world, tmp_path / name, *paths, *how, *more)
    starter.finish("train/lora.py", *run, faults=[record(file, ENCODED)])
    return len(recorded(file))


def flipped(path):
    """Other pixels in as many bytes at the same time of modification, in place."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    at = content.index(b"\x01\x02\x03" * 4)
    content[at : at + 12] = b"\x03\x02\x01" * 4
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_ino == before.st_ino


@pytest.mark.slow
def test_only_what_was_edited_is_encoded_again(starter, world, tmp_path):
    from PIL import Image

    for number in range(4):
        picture(tmp_path / "set" / f"{number}.png", (60 * number, 90, 250 - 80 * number))
    plain = tmp_path / "set" / "plain.bmp"
    Image.new("RGB", (64, 64), (3, 2, 1)).save(plain)
    plain.with_suffix(".txt").write_text("a dark square")

    def runs(name):
        return encoded(starter, world, tmp_path, name)

    assert runs("first") == 5
    assert runs("again") == 0
    flipped(plain)
    assert runs("edited") == 1
    picture(tmp_path / "set" / "2.png", (1, 200, 9))
    assert runs("replaced") == 1
    os.utime(tmp_path / "set" / "0.png")
    shutil.copy2(tmp_path / "set" / "1.png", tmp_path / "copy.png")
    os.replace(tmp_path / "copy.png", tmp_path / "set" / "1.png")
    assert runs("touched") == 0
