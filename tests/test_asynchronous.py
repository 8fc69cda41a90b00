"""Checkpoints that are written beside training: as it was when they were saved, or not at all."""

import threading

import pytest
import torch

from tests.small_nets import Net, contents, named, optimizer_of, restored, same, saved, train
from train import checkpoint
from train.averaging import MovingAverage
from train.background import Background
from train.checkpoint import Checkpoints
from train.config import RunFailed
from train.training_state import optimizer_state


@pytest.fixture
def written(tmp_path):
    return saved(tmp_path / "checkpoints", asynchronous=True)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """Checkpoints whose writer waits, until the event, before its first file."""
    go, write = threading.Event(), checkpoint.write_pieces

    def slow(path, tensors):
        assert go.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_pieces", slow)
    return Checkpoints(tmp_path / "checkpoints", keep=2, asynchronous=True), go


def test_training_goes_on_while_its_state_is_written_as_it_was(held):
    checkpoints, go = held
    model = Net()
    optimizer, averages = optimizer_of(model), MovingAverage(model, 0.5)
    train(model, optimizer, 2)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    mean = {k: v.clone() for k, v in averages.state().items()}
    moments, scalars = optimizer_state(named(model), optimizer)
    moments = {k: v.clone() for k, v in moments.items()}
    checkpoints.save(2, model, optimizer, averages.state())
    train(model, optimizer, 3, start=2)
    averages.update(3, torch.ones(()))
    optimizer.param_groups[0]["maximize"] = True
    assert checkpoints.steps() == []
    go.set()
    _, other, its_optimizer = restored(checkpoints)
    same(other.state_dict(), weights)
    same(optimizer_state(named(other), its_optimizer)[0], moments)
    assert optimizer_state(named(other), its_optimizer)[1] == scalars
    its_averages = MovingAverage(other, 0.5)
    checkpoints.load(2, other, its_optimizer, its_averages)
    same(its_averages.state(), mean)


def test_one_is_written_at_a_time(held):
    checkpoints, go = held
    model = Net()
    checkpoints.save(1, model, optimizer_of(model))
    second = threading.Thread(target=checkpoints.save, args=(2, model, optimizer_of(model)))
    second.start()
    second.join(0.1)
    assert second.is_alive() and checkpoints.steps() == []
    go.set()
    second.join()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def fails_in_the_background(checkpoints, monkeypatch):
    model = Net()
    with monkeypatch.context() as patch:

        def full(path, tensors):
            raise OSError(28, "No space left on device")

        patch.setattr(checkpoint, "write_pieces", full)
        checkpoints.save(6, model, optimizer_of(model))
        checkpoints._background._begun.done.wait()
    return model, optimizer_of(model)


ASKED = {
    "wait": lambda checkpoints, _: checkpoints.wait(),
    "close": lambda checkpoints, _: checkpoints.close(),
    "mark_best": lambda checkpoints, _: checkpoints.mark_best(6),
    "load": lambda checkpoints, state: checkpoints.load(4, *state),
    "find": lambda checkpoints, _: checkpoints.find(),
}


@pytest.mark.parametrize("way", ASKED)
def test_a_write_that_failed_is_raised_once_by_whatever_comes_next(written, monkeypatch, way):
    checkpoints, _, _ = written
    state = fails_in_the_background(checkpoints, monkeypatch)
    with pytest.raises(RunFailed, match="step 6 could not be written"):
        ASKED[way](checkpoints, state)
    assert contents(checkpoints) == ["step-00000002", "step-00000004"]
    checkpoints.save(8, *state)
    checkpoints.close()
    assert checkpoints.steps() == [4, 8]


def test_a_disk_that_was_full_for_a_while_costs_one_checkpoint(written, monkeypatch, capsys):
    checkpoints, _, _ = written
    state = fails_in_the_background(checkpoints, monkeypatch)
    checkpoints.save(8, *state)
    assert checkpoints.steps() == [4, 8]  # at once: the run would not go on without
    assert "warning: the checkpoint of step 6 could not be written" in capsys.readouterr().out


def test_what_ends_a_run_is_not_hidden_by_a_write_that_failed(written, monkeypatch, capsys):
    checkpoints, _, _ = written
    fails_in_the_background(checkpoints, monkeypatch)
    with pytest.raises(SystemExit) as ending:
        try:
            raise SystemExit(143)
        finally:
            checkpoints.close()
    assert ending.value.code == 143
    assert "warning: the checkpoint of step 6 could not be" in capsys.readouterr().out


def test_a_writer_that_hangs_does_not_hold_up_the_end_for_ever(held, monkeypatch):
    checkpoints, go = held
    monkeypatch.setattr(checkpoint, "_PATIENCE", 0.05)
    checkpoints.save(1, Net(), optimizer_of(Net()))
    with pytest.raises(RunFailed, match="writing a checkpoint is not done after 0.05 seconds"):
        checkpoints.close()
    go.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_any_failure_beside_training_is_raised_as_it_is():
    background = Background("work")
    background.start(lambda: {}["none"])
    with pytest.raises(KeyError, match="none"):
        background.wait()
    background.wait()
