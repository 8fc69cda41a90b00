"""Files of tensors that are read and written one by one."""

import gc
import hashlib
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train import stored_tensors
from train.config import UserError
from train.safetensors_file import read_header
from train.stored_tensors import Stored, of_tensor

TENSORS = {
    "half": torch.randn(3).half(),
    "number": torch.tensor(0.5),
    "bf16": torch.randn(5, 1).bfloat16(),
    "ids": torch.arange(77)[None],
    "empty": torch.zeros(0, 4),
    "matrix": torch.randn(4, 6),
    "across": torch.randn(4, 6).T,
}


def write(path, tensors=TENSORS, metadata=None, **how):
    stored = {name: of_tensor(tensor) for name, tensor in tensors.items()}
    stored_tensors.write(path, stored, metadata or {}, **how)
    return path


def test_what_is_written_is_read_the_same_by_the_library_and_here(tmp_path):
    file = write(tmp_path / "a.safetensors", metadata={"b": "2", "a": "1"})
    loaded = load_file(file)
    stored = stored_tensors.of_files([file])
    assert loaded.keys() == stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        for found in (loaded[name], stored[name].read()):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].size == tensor.numel() * tensor.element_size()
    assert read_header(file).metadata == {"a": "1", "b": "2"}


def test_equal_content_makes_equal_bytes_and_the_hash_is_of_what_follows_the_header(tmp_path):
    one = write(tmp_path / "a", metadata={"b": "2", "a": "1"}, hashed="hash").read_bytes()
    swapped = dict(reversed(TENSORS.items()))
    assert write(tmp_path / "b", swapped, {"a": "1", "b": "2"}, hashed="hash").read_bytes() == one
    tensors = one[8 + int.from_bytes(one[:8], "little") :]
    with safe_open(str(tmp_path / "a"), "pt") as file:
        assert file.metadata()["hash"] == "0x" + hashlib.sha256(tensors).hexdigest()


def test_one_tensor_at_a_time_is_held(tmp_path):
    alive = []

    def made():
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        tensor = torch.ones(8)
        alive.append(weakref.ref(tensor))
        return tensor

    stored = {name: Stored("F32", (8,), made) for name in "abc"}
    stored_tensors.write(tmp_path / "a", stored_tensors.cast(stored, torch.float16), {})
    assert len(alive) == 3 and load_file(tmp_path / "a")["c"].dtype == torch.float16


def test_numbers_that_do_not_fit_are_named_and_leave_no_file(tmp_path):
    for value, dtype, says in (
        (1e6, torch.float16, "big.weight does not fit into float16; use bf16 or fp32"),
        (float("nan"), None, "big.weight is not finite"),
    ):
        stored = {"big.weight": of_tensor(torch.tensor([1.0, value]))}
        with pytest.raises(UserError, match=says):
            stored_tensors.write(tmp_path / "a", stored_tensors.cast(stored, dtype), {})
        assert list(tmp_path.iterdir()) == []
    big = stored_tensors.cast({"x": of_tensor(torch.tensor([1e6]))}, torch.bfloat16)["x"]
    assert big.kind == "BF16" and big.read().isfinite().all()


def test_integers_stay_what_they_are():
    cast = stored_tensors.cast({"ids": of_tensor(torch.arange(3))}, torch.float16)
    assert cast["ids"].kind == "I64" and cast["ids"].read().dtype == torch.int64


def test_weights_of_8_bits_are_refused_by_name(tmp_path):
    save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="w is stored as F8_E4M3; give a model in fp32"):
        stored_tensors.of_files([tmp_path / "a.safetensors"])
