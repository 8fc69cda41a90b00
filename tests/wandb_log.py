"""What an offline run of wandb holds, read from its transaction log: LevelDB's log format around
the records of wandb's own protobuf (wandb 0.31 has no reader in Python any more)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

_BLOCK, _HEAD = 32768, 7
_WHOLE, _LAST = 1, 4  # kinds of a piece that ends a record


def records(file: Path) -> Iterator[Any]:
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, record = _HEAD, b""
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEAD])
        record += data[at + _HEAD : at + _HEAD + size]
        at += _HEAD + size
        if kind in (_WHOLE, _LAST):
            message = messages.Record()
            message.ParseFromString(record)
            yield message
            record = b""


class OfflineRun:
    """Everything of one folder `offline-run-...`."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("*.wandb")
        self.folder, self.records = folder, list(records(file))

    def of(self, kind: str) -> list[Any]:
        return [
            getattr(record, kind)
            for record in self.records
            if record.WhichOneof("record_type") == kind
        ]

    @property
    def run(self) -> Any:
        return self.of("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update}

    @property
    def history(self) -> list[dict[str, Any]]:
        """Its lines, each value by its dotted name where it lies deeper."""
        return [_items(line.item) for line in self.of("history")]

    @property
    def summary(self) -> dict[str, Any]:
        return {k: v for one in self.of("summary") for k, v in _items(one.update).items()}

    def curve(self, name: str) -> list[tuple[int, Any]]:
        """Steps and values."""
        return [(line["step"], line[name]) for line in self.history if name in line]

    @property
    def artifacts(self) -> dict[str, list[str]]:
        """The files of each, by its type."""
        found: dict[str, list[str]] = {}
        for artifact in self.of("artifact"):
            paths = [entry.path for entry in artifact.manifest.contents]
            found.setdefault(artifact.type, []).extend(paths)
        return found

    def tables(self, name: str) -> list[dict[str, Any]]:
        """Those that were logged under a name, in order, with their pictures' paths."""
        entries = [
            entry for artifact in self.of("artifact") for entry in artifact.manifest.contents
        ]
        files = [e.local_path for e in entries if e.path.endswith(f"{name}.table.json")]
        return [json.loads(Path(file).read_text()) for file in files]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
