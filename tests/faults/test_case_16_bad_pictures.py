"""Case 16: pictures that are damaged, or no pictures -> each is named with its reason, before
anything is trained; the run stops, goes on without them, or puts copies aside, as configured."""

import json

import pytest

from tests import bad_images
from tests.faults.removals import Removal
from tests.runs import arguments

WITHOUT = [
    Removal(
        "pictures are decoded to the last pixel",
        "data/images.py",
        "        image.load()\n",
        "        pass\n",
        "prepared",
    ),
    Removal(
        "what cannot be used stops a run",
        "data/sources.py",
        'if rejected and (on_bad == "abort" or not len(table)):',
        "if rejected and not len(table):",
        "stops",
    ),
    Removal(
        "what is left out is copied to the quarantine",
        "data/quarantine.py",
        "copies = {bad.id: made for bad in rejected if (made := _copied(bad, folder))}",
        "copies = {}",
        "copies",
    ),
    Removal(
        "the reasons are written down",
        "data/quarantine.py",
        'write_atomically(folder / REASONS, _text("".join(lines)).encode())',
        'write_atomically(folder / REASONS, b"")',
        "copies",
    ),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """The set, and the names that must be refused, each with words of the reason."""
    folder = tmp_path_factory.mktemp("bad") / "set"
    expected = bad_images.write_all(folder)
    refused = {
        name.removeprefix("sidecars/"): kind.words
        for name, kind in expected.items()
        if name.startswith("sidecars/") and kind.pixels is None
    }
    assert len(refused) > 20
    return folder / "sidecars", refused


def run(world, bad, output, *more):
    return arguments(world, output, f"data.path={bad[0]}", "preview.every=0", *more)


def test_a_run_stops_before_it_begins_and_names_them(starter, world, bad, tmp_path):
    said = starter.finish("train/lora.py", *run(world, bad, tmp_path / "run"), code=2)
    assert f"{len(bad[1])} cannot be used" in said and "data.on_bad_image=report" in said
    named = [f"{name}: " in said for name in sorted(bad[1])[:20]]
    assert all(named) and "base" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_goes_on_without_them_and_keeps_copies_with_reasons(starter, world, bad, tmp_path):
    how = ("data.on_bad_image=quarantine", "train.steps=2", "validation.every=0")
    before = sorted((path.name, path.lstat().st_mtime_ns) for path in bad[0].rglob("*"))
    said = starter.finish("train/lora.py", *run(world, bad, tmp_path / "run", *how))
    assert f"left out ({len(bad[1])})" in said
    folder = tmp_path / "run" / "quarantine"
    reasons = dict(
        line.split(":\t") for line in (folder / "reasons.txt").read_text("utf-8").splitlines()
    )
    assert reasons.keys() == bad[1].keys()
    assert [name for name, words in bad[1].items() if words not in reasons[name]] == []
    copy = (folder / "flipped-png.png").read_bytes()
    assert copy == (bad[0] / "flipped-png.png").read_bytes()
    assert not (folder / "pipe.jpg").exists() and not (folder / "link-out.png").exists()
    assert sorted((path.name, path.lstat().st_mtime_ns) for path in bad[0].rglob("*")) == before
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def test_the_report_of_a_prepared_set_names_each_with_its_reason(starter, bad, tmp_path):
    out = tmp_path / "out"
    starter.finish("scripts/prepare.py", f"source={bad[0]}", f"output={out}", "duplicates=off")
    report = json.loads((out / "report.json").read_text("utf-8"))
    found = {each["id"]: each["reason"] for each in report["rejected"]}
    assert found.keys() == bad[1].keys()
    assert [name for name, words in bad[1].items() if words not in found[name]] == []
    assert report["counts"]["rejected"] == len(bad[1])
    page = (out / "report.html").read_text("utf-8")
    assert "cut-png.png" in page and "Cannot be used" in page
