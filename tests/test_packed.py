"""What is written is what safetensors reads."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from xxhash import xxh3_128_hexdigest

from train import checkpoint_files, packed
from train.checkpoint_files import read_tensors, write_pieces
from train.packed import Packed, Scattered


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


def filled(tensors):
    memory = Packed(tensors)
    memory.fill(tensors)
    return memory


WAYS = {"packed": filled, "scattered": Scattered}
both_ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@both_ways
@pytest.mark.parametrize("chunk", [1, 16, 4 * 2**20])
def test_every_kind_of_tensor_is_written_as_safetensors_reads_it(tmp_path, monkeypatch, chunk, way):
    for module in (packed, checkpoint_files):
        monkeypatch.setattr(module, "CHUNK", chunk)
    file = tmp_path / "file.safetensors"
    written = write_pieces(file, way(TENSORS).pieces())
    for read in (load_file(file), read_tensors(file)):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            same_bits(read[name], tensor)
    with safe_open(file, "pt") as lazily:
        same_bits(lazily.get_slice("turned")[1:3], TENSORS["turned"][1:3])
    content = file.read_bytes()
    assert written == {"bytes": len(content), "xxh3_128": xxh3_128_hexdigest(content)}
    assert int.from_bytes(content[:8], "little") % 8 == 0


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_state_gives_the_same_bytes_and_they_are_safetensors_own(dtype, way):
    tensors = {f"layer.{n}.weight": torch.randn(n, 3).to(dtype) for n in range(12)}
    turned = dict(reversed(tensors.items()))
    contents = [b"".join(way(t).pieces()) for t in (tensors, turned)]
    assert contents == [save(tensors)] * 2


@both_ways
def test_nothing_at_all_is_a_file_too(tmp_path, way):
    file = tmp_path / "none"
    assert write_pieces(file, way({}).pieces())["bytes"] == file.stat().st_size
    assert read_tensors(file) == {}


def test_memory_is_filled_again_with_what_fits():
    first, second = ({"a": torch.randn(2, 3), "b": torch.randn(4).half()} for _ in range(2))
    memory = filled(first)
    place = memory.tensors["a"].data_ptr()
    assert memory.fits(second)
    memory.fill(second)
    same_bits(memory.tensors["a"], second["a"])
    assert memory.tensors["a"].data_ptr() == place
    assert b"".join(memory.pieces()) == save(second)


OTHERS = {
    "another name": {"a": torch.ones(2), "c": torch.ones(3)},
    "another shape": {"a": torch.ones(2), "b": torch.ones(4)},
    "another dtype": {"a": torch.ones(2), "b": torch.ones(3).half()},
    "one more": {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)},
    "another order": {"b": torch.ones(3), "a": torch.ones(2)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_does_not_fit_is_told(kind):
    assert not Packed({"a": torch.ones(2), "b": torch.ones(3)}).fits(OTHERS[kind])
