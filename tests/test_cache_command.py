"""scripts/cache.py: names and removes what is damaged, and clears what is unused."""

import os
import time

import pytest
import torch

from data.store import TensorStore
from scripts import cache
from train.config import RunFailed, UserError


@pytest.fixture
def store(tmp_path):
    store = TensorStore(tmp_path / "cache")
    for key in ("a1", "b2"):
        with store.writer() as writer:
            writer.put(key, {"moments": torch.ones(100)})
    return store


def shards(store):
    return sorted(store.shards.glob("*.safetensors"))


def test_damage_is_named_and_taken_out(store, capsys):
    cache.main(["verify", f"cache={store.folder}"])
    assert "is sound" in capsys.readouterr().out
    content = bytearray(shards(store)[0].read_bytes())
    content[-1] ^= 1
    shards(store)[0].write_bytes(content)
    with pytest.raises(RunFailed, match="damaged .1 found.: repair=true"):
        cache.main(["verify", f"cache={store.folder}"])
    assert shards(store)[0].name in capsys.readouterr().out
    cache.main(["verify", f"cache={store.folder}", "repair=true"])
    cache.main(["verify", f"cache={store.folder}"])
    assert "is sound" in capsys.readouterr().out and len(shards(store)) == 1


def test_what_no_run_has_used_lately_goes(store, capsys):
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(shards(store)[0], (long_ago, long_ago))
    cache.main(["prune", f"cache={store.folder}"])
    assert "kept 1 entries, removed 1" in capsys.readouterr().out
    cache.main(["prune", f"cache={store.folder}", "unused_days=0"])
    assert shards(store) == []


def test_mistakes_name_the_remedy(tmp_path):
    with pytest.raises(UserError, match="verify or prune"):
        cache.main(["prun"])
    with pytest.raises(UserError, match="is no cache"):
        cache.main(["prune", f"cache={tmp_path}"])
    assert list(tmp_path.iterdir()) == []
