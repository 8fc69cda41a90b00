"""safetensors files, valid ones with something changed: they are read alike by the library and
here, or refused with UserError."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import safe_open

from eval import reference_file
from tests.fuzz.mutations import nested, odd, odd_texts, spoilt
from tests.fuzz.watch import outcome
from train import adapter_file, adapter_settings, lora_file, start_from
from train.adapter_file import Shapes
from train.safetensors_file import read_header

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BASE: Shapes = {
    lora_file.spelled(LAYER): (8, 8),
    "text_encoder_embeddings_token_embedding": (9, 8),
}
LENGTHS = [0, 1, 2, 7, 2**20, 10 << 20, 100_000_000, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
NAMES = [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", f"{LAYER}.alpha", "<owl>"]
NAMES += ["emb_params", "mean", "m2", "__metadata__", "lora_unet_mid_block.lora_down.weight"]
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "BOOL", "U8", "F4", "f32", "", "C64", "F8_E4M3"]
SETTINGS = {"unet.r": 2, "unet.lora_alpha": 4.0, "unet.alpha_pattern": {LAYER[5:]: 3.0}}


@dataclass(frozen=True)
class Example:
    content: bytes


@cache
def _valid() -> list[tuple[dict[str, Any], int]]:
    """Headers and how many bytes of tensors follow them."""
    lora = {
        NAMES[0]: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]},
        NAMES[1]: {"dtype": "F16", "shape": [8, 2], "data_offsets": [64, 96]},
    }
    alpha = {NAMES[2]: {"dtype": "BF16", "shape": [], "data_offsets": [96, 98]}}
    settings = {"__metadata__": {adapter_settings.KEY: json.dumps(SETTINGS), "a": "<b>"}}
    word = {"<owl>": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}
    extractor = {"sha256": "ab", "resize": "clean", "dimension": 2}
    about = {"extractor": extractor, "n": 5, "sources": {}}
    reference = {
        "__metadata__": {"format": reference_file.FORMAT, "about": json.dumps(about)},
        "m2": {"dtype": "F64", "shape": [2, 2], "data_offsets": [0, 32]},
        "mean": {"dtype": "F64", "shape": [2], "data_offsets": [32, 48]},
    }
    return [
        ({**lora, **alpha}, 98),
        ({**settings, **lora}, 96),
        (word, 64),
        (reference, 48),
        ({}, 0),
    ]


def _header(draw: st.DrawFn, content: dict[str, Any]) -> bytes:
    keys = [*NAMES, "dtype", "shape", "data_offsets", "r", "unet.megatron_config", "about"]
    content = draw(odd(content, keys))
    for name, entry in content.items() if isinstance(content, dict) else ():
        if name == "__metadata__" and isinstance(entry, dict):
            for key, text in entry.items():
                if isinstance(text, str) and draw(st.booleans()):
                    entry[key] = _inner(draw, text)
        elif isinstance(entry, dict) and draw(st.integers(0, 4)) == 0:
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif isinstance(entry, dict) and draw(st.integers(0, 4)) == 0:
            entry["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 8, 2**32, 2**63]), max_size=4))
        elif isinstance(entry, dict) and draw(st.integers(0, 4)) == 0:
            entry["data_offsets"] = draw(
                st.lists(st.sampled_from([0, 32, 64, 96, 98, 2**62]), min_size=2, max_size=2)
            )
    text = json.dumps(content)
    if draw(st.integers(0, 9)) == 0:
        text = text.replace("<owl>", draw(odd_texts).replace('"', ""))
    if draw(st.integers(0, 9)) == 0 and text.startswith("{"):  # the first name twice
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _inner(draw: st.DrawFn, text: str) -> str:
    """JSON within the metadata."""
    try:
        content = json.loads(text)
    except ValueError:
        return draw(odd_texts)
    keys = ["unet.r", "unet.target_modules", "unet.rank_pattern", "unet.x", "extractor", "n"]
    changed = json.dumps(draw(odd(content, keys))).encode()
    return draw(st.just(changed) | spoilt(changed)).decode("utf-8", "replace")


@st.composite
def examples(draw: st.DrawFn) -> Example:
    content, size = draw(st.sampled_from(_valid()))
    if draw(st.integers(0, 19)) == 0:
        header = draw(st.sampled_from([nested(1000), nested(200_000), b'{"a":' * 50_000, b"{}  "]))
    else:
        header = _header(draw, content)
    if draw(st.integers(0, 3)) == 0:
        header = draw(spoilt(header))
    header += b" " * draw(st.sampled_from([0, 0, -len(header) % 8]))
    length = len(header)
    if draw(st.integers(0, 9)) == 0:
        length = draw(st.sampled_from([*LENGTHS, length - 1, length + 1]))
    tensors = bytes(draw(st.sampled_from([size, size, size, size, 0, size + 8, max(size - 1, 0)])))
    file = struct.pack("<Q", max(length, 0)) + header + tensors
    return Example(file if draw(st.integers(0, 9)) else draw(spoilt(file)))


def check(example: Example, folder: Path) -> None:
    """The property. What is read here the library reads as well, names and shapes alike."""
    file = folder / "a.safetensors"
    file.write_bytes(example.content)
    header = outcome(lambda: read_header(file))
    if header is not None:
        with safe_open(file, framework="pt") as found:
            shapes = {name: tuple(found.get_slice(name).get_shape()) for name in found.keys()}
            assert shapes == {name: entry.shape for name, entry in header.tensors.items()}
            assert (found.metadata() or {}) == header.metadata
            for name, entry in header.tensors.items():
                value = found.get_tensor(name)
                assert value.numel() * value.element_size() == entry.last - entry.first
    adapter = outcome(lambda: adapter_file.find(str(file)))
    if adapter is not None:
        outcome(lambda: adapter_file.check([adapter], BASE, {"a"}))
    outcome(lambda: start_from.described(file))
    wanted = {start_from.spelled(LAYER): start_from.Layer(2, 2.0, False)}
    outcome(lambda: start_from.check(file, wanted, BASE))
    outcome(lambda: reference_file.read(file))
