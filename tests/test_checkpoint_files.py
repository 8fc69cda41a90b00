"""What is written is what safetensors reads, and what is read is what was written."""

import hashlib
import json
import os

import pytest
import torch

from train import checkpoint_files
from train.checkpoint_files import (
    FORMAT,
    DamagedCheckpoint,
    read_manifest,
    read_tensors,
    verify,
    write_pieces,
    write_synced,
)
from train.packed import Scattered


def test_what_is_written_in_parts_is_written_whole(tmp_path, monkeypatch):
    """A disk may take less at a time than it is given."""

    class Reluctant:
        def __init__(self):
            self.taken = b""

        def write(self, data):
            self.taken += bytes(data[:3])
            return min(len(data), 3)

    file = Reluctant()
    checkpoint_files.append(file, bytes(range(100)))
    assert file.taken == bytes(range(100))


# Manifests


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of step 3."""
    path = tmp_path / "step-00000003"
    path.mkdir()
    names = ("model.safetensors", "optimizer.safetensors")
    files = {
        name: write_pieces(path / name, Scattered({"x": torch.ones(3)}).pieces()) for name in names
    }
    manifest = {
        "format": FORMAT,
        "step": 3,
        "files": files,
        "optimizer": {"state": {}, "groups": []},
    }
    write_synced(path / "manifest.json", json.dumps(manifest))
    assert verify(path) == manifest
    return path


MODEL = "model.safetensors"


def listing(manifest, **about):
    """With the model's file said to be another."""
    return manifest | {"files": manifest["files"] | {MODEL: manifest["files"][MODEL] | about}}


BAD = {
    "a list": lambda m: [m],
    "a number": lambda m: 3,
    "no step": lambda m: {k: v for k, v in m.items() if k != "step"},
    "another step": lambda m: m | {"step": 4},
    "a step of text": lambda m: m | {"step": "3"},
    "a step that is none": lambda m: m | {"step": True},
    "another format": lambda m: m | {"format": 3},
    "another hash": lambda m: m | {"format": 1},
    "files in a list": lambda m: m | {"files": list(m["files"])},
    "a file outside": lambda m: m | {"files": m["files"] | {"../x.safetensors": m["files"][MODEL]}},
    "a size of text": lambda m: listing(m, bytes="9"),
    "a size below 0": lambda m: listing(m, bytes=-1),
    "a short hash": lambda m: listing(m, xxh3_128="0"),
    "no model": lambda m: m | {"files": {k: v for k, v in m["files"].items() if k != MODEL}},
    "groups in a mapping": lambda m: m | {"optimizer": {"state": {}, "groups": {}}},
    "state in a list": lambda m: m | {"optimizer": {"state": [], "groups": []}},
    "state within state": lambda m: m | {"optimizer": {"state": {"a/b": {}}, "groups": []}},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_manifest_of_another_form_is_damage_and_is_named(folder, kind):
    file = folder / "manifest.json"
    file.write_text(json.dumps(BAD[kind](json.loads(file.read_text()))))
    with pytest.raises(DamagedCheckpoint, match=r"step-00000003/manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, "{" * 100, '{"format": 2', "", "\ud800"])
def test_a_manifest_that_is_no_json_is_damage(folder, content):
    (folder / "manifest.json").write_text(content, errors="surrogatepass")
    with pytest.raises(DamagedCheckpoint, match="manifest"):
        read_manifest(folder)


def test_a_manifest_without_end_is_not_read(folder):
    os.truncate(folder / "manifest.json", 2**40)
    with pytest.raises(DamagedCheckpoint, match="too large"):
        read_manifest(folder)


def test_a_file_whose_hash_is_right_but_that_holds_no_tensors_is_damage(folder):
    with pytest.raises(DamagedCheckpoint, match="manifest.json cannot be read"):
        read_tensors(folder / "manifest.json")


def test_a_disk_that_cannot_read_is_damage(folder, monkeypatch):
    def broken(stream, kind):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", broken)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors cannot be read.*error"):
        verify(folder)


def test_without_hashes_only_sizes_are_looked_at(folder):
    file = folder / MODEL
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    verify(folder, hashes=False)
    with pytest.raises(DamagedCheckpoint, match="hash differ"):
        verify(folder)
    os.truncate(file, 5)
    with pytest.raises(DamagedCheckpoint, match="size"):
        verify(folder, hashes=False)


def test_an_older_checkpoint_is_verified_by_its_own_hash(folder):
    manifest = read_manifest(folder)
    for name, about in manifest["files"].items():
        del about["xxh3_128"]
        about["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_synced(folder / "manifest.json", json.dumps(manifest | {"format": 1}))
    assert verify(folder)["format"] == 1
    with (folder / MODEL).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(DamagedCheckpoint, match="hash differ"):
        verify(folder)
