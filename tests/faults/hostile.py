"""Files that somebody else made, for the cases about those; and the memory of a run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.faults.processes import Run, Starter
from train.resident import peak_resident

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;"
_LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"


def picture(
    path: Path, colour: tuple[int, int, int] = (200, 30, 30), caption: str | None = "a dot"
):
    """A picture of 64 pixels that no other colour's looks like, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    pixels = np.full((64, 64, 3), colour, np.uint8)
    at = sum(colour) % 40
    pixels[at : at + 16, at : at + 20] = 255 - pixels[0, 0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def peak(run: Run, timeout: float = 60) -> tuple[float, float]:
    """The most memory that a run had resident, in MiB, and how many seconds it took."""
    began, most = time.monotonic(), 0.0
    while run.running:
        assert time.monotonic() - began < timeout, f"not done after {timeout} s\n{run.output}"
        most = max(most, peak_resident(run.pids[0]) / 2**20)
        time.sleep(0.002)
    run.wait(timeout)
    return most, time.monotonic() - began


def all_refused(
    starter: Starter, entry: str, commands: Sequence[Sequence[str]], **options: Any
) -> list[str]:
    """What each of several runs says, all of which must end with exit code 2 in a message of a few
    lines. Few are under way at a time."""
    said = []
    for at in range(0, len(commands), 4):
        runs = [starter.start(entry, *command, **options) for command in commands[at : at + 4]]
        for run in runs:
            codes = run.wait(60)
            assert codes == [2], f"{codes}\n{run.output}"
            assert "Traceback" not in run.output and "error: " in run.output, run.output
            said.append(run.output)
    return said


def safetensors(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None):
    """A file of that header, of which the first eight bytes may say another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class Payload:
    """What unpickles to a file that was not there."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.canary),))


def pickled(canary: Path) -> bytes:
    """Bytes that make `canary`, a folder, when they are unpickled."""
    return pickle.dumps({"state_dict": Payload(canary)})


def entry(
    shape: Sequence[Any] = (1,), offsets: Sequence[Any] = (0, 4), dtype: str = "F32"
) -> dict[str, Any]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _adapter(**settings: Any) -> bytes:
    """An adapter whose settings are handed to PEFT."""
    down, up = entry((2, 32), (0, 256)), entry((64, 2), (256, 768))
    text = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    content = {"__metadata__": {"lora_adapter_metadata": text}}
    return safetensors(content | {_LAYER.format("A"): down, _LAYER.format("B"): up}, bytes(768))


@cache
def hostile_adapters() -> dict[str, tuple[bytes, str]]:
    """Files by name, each with words of what is said of it."""
    many = json.dumps({f"t{k}": entry((0,), (0, 0)) for k in range(100_000)}).encode()
    twice = b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
    deep = b'{"a":' * 200_000
    return {
        "length": (safetensors({}, length=2**63), "claims 9223372036854775808 bytes"),
        "longest": (safetensors({}, length=2**64 - 1), "claims 18446744073709551615 bytes"),
        "padded": (safetensors(b"{}" + b" " * 99_999_998), "claims 100000000 bytes"),
        "many": (safetensors(many), "names 100000 tensors"),
        "deep": (safetensors(deep), "nested too deep"),
        "lists": (safetensors(b'{"a":' + b"[" * 200_000), "nested too deep"),
        "overlap": (safetensors({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), "overlaps"),
        "same": (safetensors({"a": entry(), "b": entry()}, bytes(4)), "overlaps"),
        "gap": (safetensors({"a": entry(offsets=(4, 8))}, bytes(8)), "leaves a gap"),
        "beyond": (safetensors({"a": entry(offsets=(0, 2**62))}, bytes(4)), "bytes that its shape"),
        "cut": (safetensors({"a": entry()}, bytes(3)), "is cut short"),
        "more": (safetensors({"a": entry()}, bytes(5)), "goes on after its tensors"),
        "half": (safetensors({"a": entry()}, bytes(4))[:20], "ends within its header"),
        "none": (b"", "has no header"),
        "negative": (safetensors({"a": entry((-1,))}, bytes(4)), "no possible shape"),
        "product": (safetensors({"a": entry((2**32, 2**32), (0, 0))}), "bytes that its shape"),
        "dtype": (safetensors({"a": entry(dtype="OBJECT")}, bytes(4)), "unknown kind of numbers"),
        "twice": (safetensors(twice, bytes(4)), "has a twice"),
        "list": (safetensors(b"[]"), "is no JSON object"),
        "page": (b"<!doctype html><title>404</title>", "cannot be read as safetensors"),
        "markup": (safetensors({EVIL: entry((3,))}, bytes(4)), "its tensor <script>"),
        "screen": (safetensors({"\x1b[2J\n": entry((3,))}, bytes(4)), "'\\x1b[2J\\n'"),
        "patterns": (_adapter(alpha_pattern={"(a+)+$": 1.0}), "not of a plain LoRA"),
        "modules": (_adapter(target_modules="(.*)*x"), "not of a plain LoRA"),
        "imports": (_adapter(megatron_config={"a": 1}), "not of a plain LoRA"),
        "inner": (_adapter(eva_config="[" * 50_000), "not of a plain LoRA"),
    }
