import json
import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.faults.hostile import entry, hostile_adapters, safetensors
from train import adapter_file, adapter_settings
from train.config import UserError
from train.safetensors_file import Entry, read_bytes, read_header, shown


@pytest.fixture
def write(tmp_path):
    def write(content):
        (tmp_path / "a.safetensors").write_bytes(content)
        return tmp_path / "a.safetensors"

    return write


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b.weight": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 7),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "na\u00efve \U0001f989": torch.zeros(1, dtype=torch.float8_e4m3fn),
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "x": "<b>"})
    header = read_header(file)
    assert header.metadata == {"format": "pt", "x": "<b>"}
    assert {name: found.shape for name, found in header.tensors.items()} == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
    assert header.tensors["b.weight"].dtype == "BF16"
    values = np.frombuffer(read_bytes(file, header.tensors["a"]), "<f4").reshape(2, 3)
    assert np.array_equal(values, tensors["a"].numpy())


def test_a_file_without_tensors_or_metadata_is_one(write):
    header = read_header(write(safetensors({})))
    assert header.tensors == {} and header.metadata == {}
    assert read_header(write(safetensors({"a": entry((0,), (0, 0))}))).tensors == {
        "a": Entry("F32", (0,), 69, 69)
    }


@pytest.mark.parametrize("name", sorted(hostile_adapters()))
def test_what_is_hostile_is_refused_by_name_within_bounds(write, name):
    content, words = hostile_adapters()[name]
    file = write(content)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        adapter = adapter_file.find(str(file))
        adapter_file.check([adapter], {})
    message = str(caught.value)
    assert str(file) in message and words in message
    assert len(message) < 2000 and message.isprintable()
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": {}}, "is not described"),
        ({"a": 1}, "is not described"),
        ({"a": entry() | {"more": 1}}, "is not described"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, "is not described"),
        ({"a": entry(offsets=(0, 4, 4))}, "is not described"),
        ({"a": entry(("1",))}, "no possible shape"),
        ({"a": entry((1.0,))}, "no possible shape"),
        ({"a": entry((True,))}, "no possible shape"),
        ({"a": entry([1] * 17)}, "no possible shape"),
        ({"a": entry(offsets=(4, 0))}, "no possible place"),
        ({"a": entry(offsets=(-4, 0))}, "no possible place"),
        ({"a": entry(offsets=(0.0, 4.0))}, "no possible place"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is not of names and texts"),
        ({"__metadata__": []}, "__metadata__ is not of names and texts"),
        ({"\ud800": entry()}, "surrogates not allowed"),
        ({"__metadata__": {"a": "\ud800"}}, "surrogates not allowed"),
        ({"__metadata__": {"\ud800": "a"}}, "surrogates not allowed"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": "\xff"}', "can't decode"),
        (b'{"a"', "Expecting"),
        (b" {}", "is no JSON object"),
        (b"{}x", "Extra data"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", "limit"),
    ],
)
def test_what_is_no_header_is_refused(write, content, words):
    with pytest.raises(UserError, match="cannot be read as safetensors") as caught:
        read_header(write(safetensors(content, bytes(4))))
    assert words in str(caught.value)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, words in {
        "pipe": "no regular file",
        "device": "no regular file",
        "gone": "No such file",
        ".": "regular|directory",
    }.items():
        with pytest.raises(UserError, match=words):
            read_header(tmp_path / name)


def test_names_are_shown_short_and_plain():
    assert shown("unet.x") == "unet.x"
    assert shown("\x1b[2J") == "'\\x1b[2J'"
    assert len(shown("x" * 10_000)) < 200


# An adapter's settings


def told(**settings):
    return {adapter_settings.KEY: json.dumps({f"unet.{k}": v for k, v in settings.items()})}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8.0, "use_dora": True, "use_rslora": False, "lora_dropout": 0.1},
        {
            "target_modules": ["to_q", "to_out.0"],
            "exclude_modules": None,
            "init_lora_weights": True,
        },
        {"rank_pattern": {r"^mid_block\.to_q$": 2, "up.0": 3}, "alpha_pattern": {}},
        {
            "loftq_config": {},
            "runtime_config": {"ephemeral_gpu_offload": False},
            "eva_config": None,
        },
        {
            "megatron_core": "megatron.core",
            "peft_version": "0.21.2",
            "init_lora_weights": "gaussian",
        },
    ],
)
def test_the_settings_of_a_plain_lora_pass(tmp_path, settings):
    assert adapter_settings.read(tmp_path, told(**settings)) == {
        f"unet.{key}": value for key, value in settings.items()
    }
    assert adapter_settings.read(tmp_path, {}) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"r": "4"},
        {"r": True},
        {"lora_alpha": -1},
        {"lora_alpha": 1e9},
        {"target_modules": ".*"},
        {"target_modules": ["(a|a)*"]},
        {"rank_pattern": {"x+": 2}},
        {"rank_pattern": {"x": "2"}},
        {"rank_pattern": {f"x{k}": 2 for k in range(2000)}},
        {"init_lora_weights": "pissa"},
        {"megatron_config": {"x": 1}},
        {"megatron_core": "os"},
        {"loftq_config": {"bits": 4}},
        {"modules_to_save": ["conv_in"]},
        {"layer_replication": [[0, 10**9]]},
        {"peft_type": "LOKR"},
    ],
)
def test_others_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match="not of a plain LoRA"):
        adapter_settings.read(tmp_path / "a.safetensors", told(**settings))


@pytest.mark.parametrize("text", ["", "[", "[]", "1", "[" * 100_000, '{"unet.r": NaN}'])
def test_settings_that_are_no_json_object_are_refused(tmp_path, text):
    with pytest.raises(UserError, match="not of a plain LoRA"):
        adapter_settings.read(tmp_path, {adapter_settings.KEY: text})
