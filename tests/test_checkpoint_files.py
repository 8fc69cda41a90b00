"""What is written is what safetensors reads, and what is read is what was written."""

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from train import checkpoint_files
from train.checkpoint_files import (
    DamagedCheckpoint,
    read_manifest,
    read_tensors,
    verify,
    write_synced,
    write_tensors,
)


def whole_numbers(dtype):
    return torch.arange(-3 if dtype.is_signed else 0, 4).to(dtype)


TENSORS = {
    "matrix": torch.randn(3, 5),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "double": torch.randn(2, 2, 2).double(),
    "eight": torch.randn(5).to(torch.float8_e4m3fn),
    "other eight": torch.randn(5).to(torch.float8_e5m2),
    "bits": torch.tensor([True, False, True]),
    "scalar": torch.tensor(0.1),
    "empty": torch.empty(0),
    "empty rows": torch.empty(4, 0, 2),
    "turned": torch.randn(4, 6).t(),
    "every other": torch.randn(9)[::2],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.randn(3, 1).expand(3, 4),
    "ünïcode/exp_avg": torch.randn(2),
    "not a number": torch.tensor([float("nan"), float("inf"), -0.0]),
} | {str(d): whole_numbers(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8)}
TENSORS |= {"uint8": whole_numbers(torch.uint8)}


def same_bits(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chunk", [1, 16, 4 * 2**20])
def test_every_kind_of_tensor_is_written_as_safetensors_reads_it(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(checkpoint_files, "_CHUNK", chunk)
    file = tmp_path / "file.safetensors"
    written = write_tensors(file, TENSORS)
    for read in (load_file(file), read_tensors(file)):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            same_bits(read[name], tensor)
    with safe_open(file, "pt") as lazily:
        same_bits(lazily.get_slice("turned")[1:3], TENSORS["turned"][1:3])
    content = file.read_bytes()
    assert written == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert int.from_bytes(content[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_state_gives_the_same_bytes_and_they_are_safetensors_own(tmp_path, dtype):
    tensors = {f"layer.{n}.weight": torch.randn(n, 3).to(dtype) for n in range(12)}
    turned = dict(reversed(tensors.items()))
    hashes = [write_tensors(tmp_path / name, t) for name, t in (("a", tensors), ("b", turned))]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == save(tensors)


def test_nothing_at_all_is_a_file_too(tmp_path):
    assert write_tensors(tmp_path / "none", {})["bytes"] == (tmp_path / "none").stat().st_size
    assert read_tensors(tmp_path / "none") == {}


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
    files = {name: write_tensors(path / name, {"x": torch.ones(3)}) for name in names}
    manifest = {"format": 1, "step": 3, "files": files, "optimizer": {"state": {}, "groups": []}}
    write_synced(path / "manifest.json", json.dumps(manifest))
    assert verify(path) == manifest
    return path


MODEL = "model.safetensors"
SHA = "0" * 64
BAD = {
    "a list": lambda m: [m],
    "a number": lambda m: 3,
    "no step": lambda m: {k: v for k, v in m.items() if k != "step"},
    "another step": lambda m: m | {"step": 4},
    "a step of text": lambda m: m | {"step": "3"},
    "a step that is none": lambda m: m | {"step": True},
    "another format": lambda m: m | {"format": 2},
    "files in a list": lambda m: m | {"files": list(m["files"])},
    "a file outside": lambda m: m | {"files": m["files"] | {"../x.safetensors": m["files"][MODEL]}},
    "a size of text": lambda m: m | {"files": m["files"] | {MODEL: {"bytes": "9", "sha256": SHA}}},
    "a size below 0": lambda m: m | {"files": m["files"] | {MODEL: {"bytes": -1, "sha256": SHA}}},
    "a short hash": lambda m: m | {"files": m["files"] | {MODEL: {"bytes": 9, "sha256": "0"}}},
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


@pytest.mark.parametrize("content", ["[" * 100_000, "{" * 100, '{"format": 1', "", "\ud800"])
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
