"""Checkpoints are complete or absent, whatever happens to their writer."""

import json
import os
import shutil

import pytest
import torch

from tests.small_nets import Net, contents, named, optimizer_of, restored, same, saved, train
from train import checkpoint
from train.checkpoint import Checkpoints, DamagedCheckpoint
from train.config import RunFailed
from train.training_state import optimizer_state


@pytest.fixture
def written(tmp_path):
    return saved(tmp_path / "checkpoints")


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_on_after_a_restore_is_training_on(tmp_path, amsgrad):
    model = Net()
    optimizer = optimizer_of(model, amsgrad=amsgrad)
    train(model, optimizer, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, model, optimizer)
    step, other, its_optimizer = restored(checkpoints, amsgrad=amsgrad)
    assert step == 3
    pairs = ((named(model), optimizer), (named(other), its_optimizer))
    ours, theirs = (optimizer_state(*pair) for pair in pairs)
    same(ours[0], theirs[0])
    assert ours[1] == theirs[1] and len(ours[0]) == (4 if amsgrad else 3) * 4
    for both in ((model, optimizer), (other, its_optimizer)):
        train(*both, 4, start=3)
    same(model.state_dict(), other.state_dict())


def test_trained_parameters_stay_fp32_in_a_bf16_base(tmp_path):
    model = Net().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, model, optimizer_of(model))
    model.first.weight.data.zero_()
    checkpoints.restore(model, optimizer_of(model))
    assert model.first.weight.dtype == torch.float32 and model.first.weight.any()
    assert model.frozen.weight.dtype == torch.bfloat16


def test_a_folder_that_someone_put_aside_is_let_be(written):
    checkpoints, _, _ = written
    shutil.copytree(checkpoints.path(4), checkpoints.folder / "step-00000004.bak")
    assert checkpoints.steps() == [2, 4] and restored(checkpoints)[0] == 4


def test_facts_come_back_as_they_were_when_they_were_saved(tmp_path):
    model, checkpoints = Net(), Checkpoints(tmp_path, keep=2, asynchronous=True)
    facts = {"scale": 2.0}
    checkpoints.save(6, model, optimizer_of(model), scaler=facts)
    facts["scale"] = 1.0
    checkpoints.wait()
    assert checkpoints.facts(6)["scaler"] == {"scale": 2.0}


def test_nothing_there_is_step_0_and_changes_nothing(tmp_path):
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert Checkpoints(tmp_path / "none", keep=2).restore(model, optimizer_of(model)) == 0
    same(model.state_dict(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(written, value):
    checkpoints, model, optimizer = written
    model.last.bias.data.fill_(value)
    said = "diverged before step 6: last.bias is not finite; the checkpoint of step 4 is intact"
    with pytest.raises(RunFailed, match=said):
        checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [2, 4]


def test_weights_may_be_large(written):
    checkpoints, model, optimizer = written
    model.last.weight.data.fill_(3e38)
    checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [4, 6]


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE = {
    "flipped bit in the model": ("model.safetensors", flip),
    "flipped bit in the optimizer": ("optimizer.safetensors", flip),
    "truncated": ("model.safetensors", lambda f: os.truncate(f, f.stat().st_size - 7)),
    "empty": ("optimizer.safetensors", lambda f: os.truncate(f, 0)),
    "missing": ("model.safetensors", os.remove),
    "grown": ("model.safetensors", lambda f: f.open("ab").write(b"x")),
    "no manifest": ("manifest.json", os.remove),
    "empty manifest": ("manifest.json", lambda f: os.truncate(f, 0)),
    "torn manifest": ("manifest.json", lambda f: os.truncate(f, f.stat().st_size // 2)),
    "manifest of another kind": ("manifest.json", lambda f: f.write_text("[]")),
    "binary manifest": ("manifest.json", lambda f: f.write_bytes(b"\xff\xfe\x00")),
    "manifest without files": ("manifest.json", lambda f: edit(f, files=None)),
    "manifest that lists too little": ("manifest.json", lambda f: edit(f, files={})),
    "manifest of another step": ("manifest.json", lambda f: edit(f, step=2)),
    "manifest with text for a number": ("manifest.json", lambda f: edit(f, step="4")),
    "another format": ("manifest.json", lambda f: edit(f, format=99)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(written, kind, capsys):
    checkpoints, _, _ = written
    name, damage = DAMAGE[kind]
    expected = Net()
    train(expected, optimizer_of(expected), 2)
    damage(checkpoints.path(4) / name)
    step, model, _ = restored(checkpoints)
    assert step == 2
    same(model.state_dict(), expected.state_dict())
    said = capsys.readouterr().out
    assert "step-00000004" in said and "falling back" in said
    assert name in said


def test_if_all_are_damaged_it_never_starts_at_0(written):
    checkpoints, _, _ = written
    flip(checkpoints.path(2) / "model.safetensors")
    shutil.rmtree(checkpoints.path(4))
    checkpoints.path(4).mkdir()
    with pytest.raises(DamagedCheckpoint, match="every checkpoint.*step-00000004.*step-00000002"):
        restored(checkpoints)


def test_a_checkpoint_of_another_model_is_refused_by_name(written):
    checkpoints, _, _ = written
    model = Net()
    model.frozen.requires_grad_(True)
    with pytest.raises(DamagedCheckpoint, match="frozen.bias"):
        checkpoints.restore(model, optimizer_of(model))


def test_a_checkpoint_of_other_shapes_is_refused_by_name(written):
    """A tensor of one column would fill many without a word."""
    checkpoints, _, _ = written
    model = Net()
    model.last = torch.nn.Linear(8, 2)
    with pytest.raises(DamagedCheckpoint, match=r"its last.weight is \(1, 8\), not \(2, 8\)"):
        checkpoints.restore(model, optimizer_of(model))


REMEDIES = {28: "Free space there", 27: "ulimit -f"}


@pytest.mark.parametrize("number", REMEDIES)
def test_a_disk_that_is_full_ends_the_run_with_a_remedy(written, monkeypatch, number):
    checkpoints, model, optimizer = written

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_pieces", full)
        said = f"step 6 could not be written.*{number}.*step 4 is intact.*{REMEDIES[number]}"
        with pytest.raises(RunFailed, match=said):
            checkpoints.save(6, model, optimizer)
    assert contents(checkpoints) == ["step-00000002", "step-00000004"]
    checkpoints.save(6, model, optimizer)
    assert restored(checkpoints)[0] == 6


def test_the_newest_are_kept(written):
    checkpoints, model, optimizer = written
    for step in (6, 8, 100):
        checkpoints.save(step, model, optimizer)
    assert checkpoints.steps() == [8, 100]
    assert contents(checkpoints) == ["step-00000008", "step-00000100"]


# Writers that are killed


class Kill(BaseException):
    pass


CALLS = ("mkdir", "open", "fsync", "replace", "unlink", "rmdir")


def killed_at(number, monkeypatch, work):
    """Whether `work` was killed before its call of that number to the system, and which it was."""
    calls = []

    def before(name, original):
        def call(*arguments, **keywords):
            calls.append(name)
            if len(calls) == number:
                raise Kill
            return original(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, before(name, getattr(os, name)))
        try:
            work()
        except Kill:
            return calls[-1]
    return None


@pytest.mark.parametrize("step", [6, 4])
def test_a_writer_killed_at_any_call_loses_nothing(written, monkeypatch, step):
    """Where it writes one more, and where it writes one that is there again."""
    checkpoints, model, optimizer = written
    whole = checkpoints.folder.with_name("whole")
    shutil.copytree(checkpoints.folder, whole)
    train(model, optimizer, 2, start=4)
    seen, number = [], 0
    while True:
        number += 1
        shutil.rmtree(checkpoints.folder)
        shutil.copytree(whole, checkpoints.folder)
        killed = killed_at(number, monkeypatch, lambda: checkpoints.save(step, model, optimizer))
        for name in checkpoints.steps():
            checkpoint.verify(checkpoints.path(name))
        if killed is None:
            break
        seen.append(killed)
        found = Checkpoints(checkpoints.folder, keep=2).find()
        assert found == 4 or found == step
        left = [f"step-{one:08d}" for one in checkpoints.steps()]
        assert contents(checkpoints) == left and len(left) >= 2
        checkpoints.save(step, model, optimizer)
        assert contents(checkpoints)[-1] == f"step-{step:08d}" and len(contents(checkpoints)) == 2
    assert set(seen) == set(CALLS)


def test_everything_is_on_disk_before_the_name_appears_and_only_then_older_ones_go(
    written, monkeypatch
):
    checkpoints, model, optimizer = written
    events = []

    def note(name, original, of):
        def call(*arguments):
            events.append((name, of(*arguments)))
            return original(*arguments)

        return call

    def file_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", note("fsync", os.fsync, file_of))
    names = note("rename", os.replace, lambda source, target: target.name)
    monkeypatch.setattr(os, "replace", names)
    checkpoints.save(6, model, optimizer)
    assert events == [
        ("fsync", "model.safetensors"),
        ("fsync", "optimizer.safetensors"),
        ("fsync", "manifest.json"),
        ("fsync", ".writing-step-00000006"),
        ("rename", "step-00000006"),
        ("fsync", "checkpoints"),
        ("rename", ".removed-step-00000002"),
    ]


def test_a_folder_of_checkpoints_is_itself_on_the_disk(tmp_path, monkeypatch):
    synced = []
    sync = checkpoint.sync
    monkeypatch.setattr(checkpoint, "sync", lambda path: (synced.append(path), sync(path)))
    model = Net()
    Checkpoints(tmp_path / "run" / "checkpoints", keep=2).save(1, model, optimizer_of(model))
    assert synced[0] == tmp_path / "run"


def test_hashes_are_read_once_for_all_processes(written, monkeypatch):
    checkpoints, model, optimizer = written
    read = []
    digest = checkpoint.verify.__globals__["hashlib"].file_digest
    monkeypatch.setattr(
        "hashlib.file_digest", lambda file, kind: (read.append(file.name), digest(file, kind))[1]
    )
    step = Checkpoints(checkpoints.folder, keep=2).find()
    assert len(read) == 2
    another = Checkpoints(checkpoints.folder, keep=2, writes=False)
    another.load(step, model, optimizer, verified=True)
    assert len(read) == 2
    another.load(step, model, optimizer)
    assert len(read) == 4


# The best


def test_the_best_stays_until_another_is_better(written):
    checkpoints, model, optimizer = written
    checkpoints.mark_best(2, metric="loss", value=0.5)
    for step in (6, 8, 10):
        checkpoints.save(step, model, optimizer)
    assert checkpoints.steps() == [2, 8, 10]
    assert marked(checkpoints) == {"step": 2, "metric": "loss", "value": 0.5}
    checkpoints.mark_best(10, metric="loss", value=0.4)
    checkpoints.save(12, model, optimizer)
    checkpoints.save(14, model, optimizer)
    assert checkpoints.steps() == [10, 12, 14]
    checkpoints.mark_best(None)
    checkpoints.save(16, model, optimizer)
    assert checkpoints.steps() == [14, 16] and not (checkpoints.folder / "best.json").exists()


def marked(checkpoints):
    return json.loads((checkpoints.folder / "best.json").read_text())


def test_of_several_processes_one_marks_the_best(tmp_path):
    Checkpoints(tmp_path / "none", keep=2, writes=False).mark_best(2)
    assert not list(tmp_path.iterdir())


def test_a_best_is_written_whole_or_not_at_all(written, monkeypatch):
    checkpoints, model, optimizer = written
    checkpoints.mark_best(2)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.mark_best(4)
    assert marked(checkpoints) == {"step": 2}
    checkpoints.save(6, model, optimizer)
    assert not list(checkpoints.folder.glob(".writing-*"))

    def full(path, text):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(RunFailed, match="best.json could not be written.*No space.*Free space"):
        checkpoints.mark_best(6)


# Damaged ones among them


def test_the_newest_intact_one_is_not_pruned_for_damaged_ones_after_it(written):
    checkpoints, model, optimizer = written
    flip(checkpoints.path(4) / "model.safetensors")
    assert restored(checkpoints)[0] == 2
    checkpoints.save(3, model, optimizer)
    assert checkpoints.steps() == [2, 3, 4]
    assert restored(checkpoints)[0] == 3
    checkpoints.save(4, model, optimizer)
    assert checkpoints.steps() == [3, 4] and restored(checkpoints)[0] == 4


def test_damaged_ones_do_not_count_among_those_that_are_kept(written):
    checkpoints, model, optimizer = written
    flip(checkpoints.path(4) / "optimizer.safetensors")
    checkpoints = Checkpoints(checkpoints.folder, keep=2)
    checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [2, 4, 6]
    checkpoints.save(8, model, optimizer)
    assert checkpoints.steps() == [6, 8]


def test_one_that_is_cut_short_after_it_was_written_does_not_count(written):
    checkpoints, model, optimizer = written
    os.truncate(checkpoints.path(4) / "model.safetensors", 9)
    checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [2, 4, 6]
