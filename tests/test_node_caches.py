"""train/node_caches.py: one cache for all processes, or one on each machine."""

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from data.store import TensorStore
from tests.hf_sets import parquet
from tests.runs import arguments, finish, launch, make_world
from train.config import RunFailed
from train.node_caches import Share, share_of

SETTINGS = ("train.steps=2", "preview.every=0", "checkpoint.every=100")


def test_one_process_fills_all(tmp_path):
    alone = SimpleNamespace(process_index=0, num_processes=1)
    assert share_of(tmp_path, alone) == Share(0, 1)
    assert not list(tmp_path.iterdir())


def joined(monkeypatch, others, *, folder, rank=0):
    """A process of two; `others` is what the other one tells."""

    def told(own):
        return [*own, others] if rank == 0 else [others, *own]

    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda names: names)
    monkeypatch.setattr("accelerate.utils.gather_object", told)
    process = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: None)
    return share_of(folder, process)


def test_a_folder_that_only_one_sees_is_filled_by_it_alone(monkeypatch, tmp_path, capsys):
    assert joined(monkeypatch, (True, [1]), folder=tmp_path / "new") == Share(0, 1)
    assert "each machine fills its own" in capsys.readouterr().out
    assert not list((tmp_path / "new").iterdir())


def test_a_cache_that_one_cannot_write_is_taken_for_shared(monkeypatch, tmp_path):
    assert joined(monkeypatch, (False, []), folder=tmp_path) == Share(0, 2)
    (tmp_path / "file").touch()
    assert joined(monkeypatch, (True, [1]), folder=tmp_path / "file" / "cache") == Share(0, 2)


def test_two_that_do_not_agree_fail_the_run(monkeypatch, tmp_path):
    from pathlib import Path

    monkeypatch.setattr(Path, "exists", lambda self: True)
    with pytest.raises(RunFailed, match="shared by some processes"):
        joined(monkeypatch, (True, [1]), folder=tmp_path)


def test_the_one_that_sees_no_other_fails_with_it(monkeypatch, tmp_path):
    """Fails where it goes on, into a meeting that the other one does not come to."""
    with pytest.raises(RunFailed, match="shared by some processes"):
        joined(monkeypatch, (True, [0, 1]), folder=tmp_path, rank=1)
    assert not list(tmp_path.iterdir())


def entries(folder):
    """How many files of latents and captions a cache has."""
    return len(list((folder / "shards").glob("*.safetensors")))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_machines_with_caches_of_their_own_train_as_with_one(world, tmp_path, streamed):
    """Fails where processes divide the pictures among all, whatever their caches."""
    settings = list(SETTINGS)
    if streamed:
        settings += [f"data.path={parquet(tmp_path / 'set', 3, 4, 2)}", "data.streaming=true"]
    weights = {}
    for name, entry, cache in (
        ("shared", ["train/lora.py"], tmp_path / "one"),
        ("own", ["tests/own_caches.py", "train/lora.py"], tmp_path / "each-{rank}"),
    ):
        values = arguments(world, tmp_path / name, f"data.cache={cache}", *settings)
        said = finish(launch(entry[0], *entry[1:], *values, processes=2))
        assert ("each machine fills its own" in said) == (name == "own")
        weights[name] = load_file(tmp_path / name / "adapter/pytorch_lora_weights.safetensors")
    assert all((weights["own"][key] == value).all() for key, value in weights["shared"].items())
    assert not list(tmp_path.rglob(".seen-*"))
    for rank in "01":
        assert TensorStore(tmp_path / f"each-{rank}").verify() == []
        assert entries(tmp_path / f"each-{rank}")
