"""Each kind of bad input is read rightly, or refused by name and with its reason."""

import io
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from data.images import open_image
from data.sources import scan
from tests import bad_images
from tests.runs import ROOT
from train.config import UserError

READABLE = [name for name, (_, kind) in bad_images.kinds().items() if kind.pixels is not None]
REFUSED = [name for name, (_, kind) in bad_images.kinds().items() if kind.pixels is None]
SCAN = """
import json, resource, sys
from pathlib import Path
from data.sources import scan
from train.resident import peak_resident
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a bomb decoded takes more
found = {}
for folder in ("sidecars", "listed"):
    source = scan(Path(sys.argv[1]) / folder, on_bad="report")
    for record in source.table:
        found[f"{folder}/{record.id}"] = [record.width, record.height]
    for rejected in source.rejected:
        found[f"{folder}/{rejected.id}"] = rejected.reason
json.dump([found, peak_resident() / 2**20], open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """What is expected, and what a scan in a process of its own found: sizes, or reasons; and its
    peak memory in MiB. A pipe that is opened would hang it."""
    folder = tmp_path_factory.mktemp("bad")
    expected = bad_images.write_all(folder / "set")
    subprocess.run(
        [sys.executable, "-c", SCAN, str(folder / "set"), str(folder / "found.json")],
        cwd=ROOT,
        check=True,
        timeout=120,
    )
    found, peak = json.loads((folder / "found.json").read_text())
    return folder / "set", expected, found, peak


@pytest.mark.parametrize("name", READABLE)
def test_a_picture_is_read_as_it_should_be_seen(name):
    content, kind = bad_images.kinds()[name]
    assert_looks(open_image(io.BytesIO(content)), kind)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_picture_is_not_opened(name):
    with pytest.raises(Exception) as caught:
        open_image(io.BytesIO(bad_images.kinds()[name][0]))
    assert not isinstance(caught.value, MemoryError)


def test_every_kind_is_read_or_refused_by_name_and_reason(scanned):
    _, expected, found, _ = scanned
    wrong = [f"{name}: {found.get(name)}" for name in expected if not _right(name, expected, found)]
    assert not wrong, "\n".join(wrong)
    assert set(found) == set(expected)


def test_names_are_in_one_unicode_form(scanned):
    assert all(unicodedata.is_normalized("NFC", name) for name in scanned[2])
    assert any(not name.isascii() for name in scanned[2])


def test_a_bomb_takes_no_memory(scanned):
    assert scanned[3] < 1000  # MiB, where the picture that it claims to be takes 10,300


@pytest.mark.parametrize("part", ["sidecars", "listed"])
def test_what_is_wrong_stops_by_default_and_is_named(scanned, part):
    folder, expected, _, _ = scanned
    refused = [
        name.removeprefix(f"{part}/")
        for name, kind in sorted(expected.items())
        if name.startswith(part) and kind.pixels is None
    ]
    with pytest.raises(UserError) as caught:
        scan(folder / part)
    message = str(caught.value)
    assert f"{len(refused)} cannot be used" in message and "on_bad_image=report" in message
    assert all(name in message for name in refused[:20])


def assert_looks(image, kind):
    assert image.mode == "RGB" and image.size == kind.pixels.shape[1::-1]
    worst = np.abs(np.asarray(image, int) - kind.pixels).max()
    assert worst <= kind.tolerance, f"differs by up to {worst} of 255"


def _right(name, expected, found):
    kind, what = expected[name], found.get(name)
    if kind.pixels is None:
        return isinstance(what, str) and kind.words in what
    height, width, _ = kind.pixels.shape
    return isinstance(what, list) and what == [width, height]
