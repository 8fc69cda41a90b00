import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from train import checkpoint, optim
from train.averaging import averages_of
from train.checkpoint import Checkpoints, DamagedCheckpoint
from train.config import OptimConfig, RunFailed


class Net(nn.Module):
    """Two trained layers around a frozen one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.frozen(self.first(x)).relu())


def optimizer_of(model, **settings):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, **settings
    )


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key


@pytest.fixture
def written(tmp_path):
    """Checkpoints of steps 2 and 4, and the model and optimizer as of step 4."""
    model = Net()
    optimizer = optimizer_of(model)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (2, 4):
        train(model, optimizer, 2, start=step - 2)
        checkpoints.save(step, model, optimizer)
    return checkpoints, model, optimizer


def restored(checkpoints, **settings):
    model = Net(seed=9)
    model.frozen.load_state_dict(Net().frozen.state_dict())
    optimizer = optimizer_of(model, **settings)
    return checkpoints.restore(model, optimizer), model, optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
def test_training_on_after_a_restore_is_training_on(tmp_path, amsgrad):
    model = Net()
    optimizer = optimizer_of(model, amsgrad=amsgrad)
    train(model, optimizer, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, model, optimizer)
    step, other, its_optimizer = restored(checkpoints, amsgrad=amsgrad)
    assert step == 3
    ours, theirs = (
        checkpoint.optimizer_state(*pair) for pair in ((model, optimizer), (other, its_optimizer))
    )
    same(ours[0], theirs[0])
    assert ours[1] == theirs[1] and len(ours[0]) == (4 if amsgrad else 3) * 4
    for both in ((model, optimizer), (other, its_optimizer)):
        train(*both, 4, start=3)
    same(model.state_dict(), other.state_dict())


def test_only_what_trains_is_written_and_its_settings_come_back(written):
    checkpoints, model, optimizer = written
    names = set(checkpoint.trainable_state(model))
    assert names == {"first.weight", "first.bias", "last.weight", "last.bias"}
    optimizer.param_groups[0]["lr"] = 0.5
    checkpoints.save(6, model, optimizer)
    _, _, fresh = restored(checkpoints)
    assert fresh.param_groups[0]["lr"] == 0.5
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)


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


def test_facts_come_back(written):
    checkpoints, model, optimizer = written
    checkpoints.save(6, model, optimizer, scaler={"scale": 2.0})
    assert checkpoints.facts(6)["scaler"] == {"scale": 2.0}


def test_nothing_there_is_step_0_and_changes_nothing(tmp_path):
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert Checkpoints(tmp_path / "none", keep=2).restore(model, optimizer_of(model)) == 0
    same(model.state_dict(), before)


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
    if "format" not in kind and "lists" not in kind:
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
    model.last = nn.Linear(8, 2)
    with pytest.raises(DamagedCheckpoint, match=r"its last.weight is \(1, 8\), not \(2, 8\)"):
        checkpoints.restore(model, optimizer_of(model))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("28")])
def test_a_full_disk_ends_the_run_with_a_remedy(written, monkeypatch, error):
    checkpoints, model, optimizer = written

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(RunFailed, match="step 6 could not be written.*28.*Free space"):
            checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [2, 4] and not list(checkpoints.folder.glob(".writing-*"))
    checkpoints.save(6, model, optimizer)
    assert restored(checkpoints)[0] == 6


def test_the_newest_are_kept(written):
    checkpoints, model, optimizer = written
    for step in (6, 8, 100):
        checkpoints.save(step, model, optimizer)
    assert checkpoints.steps() == [8, 100]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "step-00000008",
        "step-00000100",
    ]


@pytest.mark.parametrize("fault", ["save_file", "write_synced", "replace"])
def test_a_writer_killed_at_any_point_leaves_only_whole_checkpoints(written, monkeypatch, fault):
    checkpoints, model, optimizer = written

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if fault == "replace" else checkpoint, fault, killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [2, 4]
    assert restored(checkpoints)[0] == 4
    assert list(checkpoints.folder.glob(".writing-*"))
    checkpoints.save(6, model, optimizer)
    assert checkpoints.steps() == [4, 6]
    assert not list(checkpoints.folder.glob(".writing-*"))


def test_older_checkpoints_go_only_after_the_new_one_is_in_place(written, monkeypatch):
    checkpoints, model, optimizer = written
    seen = []
    monkeypatch.setattr(Checkpoints, "_prune", lambda self, _: seen.append(self.steps()))
    checkpoints.save(6, model, optimizer)
    assert seen == [[2, 4, 6]]
    checkpoint.verify(checkpoints.path(6))


def test_everything_is_on_disk_before_the_name_appears(written, monkeypatch):
    checkpoints, model, optimizer = written
    events = []
    sync, replace = checkpoint.sync, os.replace
    monkeypatch.setattr(checkpoint, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("rename"), replace(*a)))
    checkpoints.save(6, model, optimizer)
    rename = events.index("rename")
    files = {"model.safetensors", "optimizer.safetensors", "manifest.json"}
    assert files <= set(events[:rename])
    assert events[rename + 1 :] == ["checkpoints"]


# Every optimizer, and the averages


RUNS = {
    "adamw": {},
    "adamw with an average": {"ema_decay": 0.6},
    "adamw8bit": {"name": "adamw8bit"},
    "adafactor": {"name": "adafactor"},
    "prodigy": {"name": "prodigy", "learning_rate": 1.0},
    "prodigy with an average": {"name": "prodigy", "learning_rate": 1.0, "ema_decay": 0.6},
    "schedule_free": {"name": "schedule_free", "schedule": "constant", "warmup_steps": 4},
}


class Wide(Net):
    """With a layer that is large enough for moments of 8 bits (4096)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.first, self.frozen = nn.Linear(3, 1500), nn.Linear(1500, 8)
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.last.bias)  # of a zero Prodigy keeps a scalar


class Run:
    """Six steps of a run as the loop takes them."""

    def __init__(self, kind, seed=0):
        settings = {"learning_rate": 0.01, "final_learning_rate": 0.0, **RUNS[kind]}
        decay = settings.pop("ema_decay", None)
        config = OptimConfig(**settings)
        self.model = Wide(seed)
        self.model.frozen.load_state_dict(Wide().frozen.state_dict())
        groups = optim.groups({"unet": self.model.named_parameters()}, config)
        self.optimizer = optim.build(groups, config)
        self.schedule = optim.Schedule(self.optimizer, steps=6, config=config)
        self.averages = averages_of(self.model, self.optimizer, decay)

    def train(self, first, last):
        for step in range(first, last):
            self.schedule.apply(step)
            train(self.model, self.optimizer, 1, start=step)
            self.averages.update(step)

    def save(self, checkpoints, step):
        checkpoints.save(step, self.model, self.optimizer, self.averages.state())

    def used(self):
        with self.averages.applied():
            return {k: v.clone() for k, v in self.model.state_dict().items()}


@pytest.mark.parametrize("kind", RUNS)
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, kind):
    straight, killed, resumed = Run(kind), Run(kind), Run(kind, seed=9)
    straight.train(0, 6)
    checkpoints = Checkpoints(tmp_path, keep=2)
    killed.train(0, 3)
    killed.save(checkpoints, 3)
    assert checkpoints.restore(resumed.model, resumed.optimizer, resumed.averages) == 3
    same(killed.used(), resumed.used())
    resumed.train(3, 6)
    same(straight.model.state_dict(), resumed.model.state_dict())
    same(straight.used(), resumed.used())
    ours, theirs = (
        checkpoint.optimizer_state(run.model, run.optimizer) for run in (straight, resumed)
    )
    same(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    same(straight.averages.state(), resumed.averages.state())
    assert {p.dtype for p in resumed.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", RUNS)
def test_of_an_earlier_checkpoint_the_weights_are_those_that_were_used_then(tmp_path, kind):
    run = Run(kind)
    run.train(0, 3)
    checkpoints = Checkpoints(tmp_path, keep=2)
    run.save(checkpoints, 3)
    expected = run.used()
    run.train(3, 6)
    checkpoints.load(3, run.model, run.optimizer, run.averages)
    run.averages.settle()
    same(run.model.state_dict(), expected)


def test_averages_are_written_where_there_are_any_and_checked_like_the_rest(tmp_path):
    averaged, plain = Run("adamw with an average"), Run("adamw")
    averaged.train(0, 2)
    checkpoints = Checkpoints(tmp_path, keep=2)
    plain.save(checkpoints, 1)
    averaged.save(checkpoints, 2)
    assert not (checkpoints.path(1) / "averages.safetensors").exists()
    flip(checkpoints.path(2) / "averages.safetensors")
    with pytest.raises(DamagedCheckpoint, match="step-00000002/averages.safetensors is damaged"):
        checkpoints.load(2, averaged.model, averaged.optimizer, averaged.averages)
    assert checkpoints.restore(averaged.model, averaged.optimizer, averaged.averages) == 1
    same(averaged.used(), plain.model.state_dict())


def test_another_number_of_groups_is_refused(written):
    checkpoints, model, _ = written
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.first.parameters()])
    with pytest.raises(DamagedCheckpoint, match="1 groups of parameters, the optimizer 2"):
        checkpoints.restore(model, optimizer)


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


def test_the_newest_intact_one_is_not_pruned_for_damaged_ones_after_it(written):
    checkpoints, model, optimizer = written
    flip(checkpoints.path(4) / "model.safetensors")
    assert restored(checkpoints)[0] == 2
    checkpoints.save(3, model, optimizer)
    assert checkpoints.steps() == [2, 3, 4]
    assert restored(checkpoints)[0] == 3
    checkpoints.save(4, model, optimizer)
    assert checkpoints.steps() == [3, 4] and restored(checkpoints)[0] == 4
