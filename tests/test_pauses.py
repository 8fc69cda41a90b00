"""What the loop does between steps, as a whole: previews, the held-out loss, the best checkpoint,
and kills at any point of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.kills import killed_and_resumed
from tests.test_loop import Regression, Samples, logged
from train import loop, overfitting, pauses
from train.checkpoint import Checkpoints, DamagedCheckpoint
from train.config import LoopConfig, RunFailed, validate
from train.loop import fit
from train.overfitting import Measured
from train.tracking import Trackers

STEPS, BEST, AIM = 8, 4, 0.9  # the weight goes from 0.5 to 2, by 0.1 a step


class HeldOut:
    """16 losses (w - AIM)^2."""

    ids = {"held_out": ["a", "b"], "train": ["x", "y"]}
    timesteps = {side: np.arange(8).reshape(2, 4) for side in ids}

    def __len__(self):
        return 1

    def __iter__(self):
        yield {"x": torch.ones(16), "y": torch.full((16,), AIM), "row": torch.arange(16)}


class Pictured(Regression):
    """Its pictures are of one colour each, and say which weight they are of."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def pipeline(self):
        return self._draw

    def _draw(self, prompt, **settings):
        self.shown.append(self.model.weight.item())
        return SimpleNamespace(images=[Image.new("RGB", (32, 32), (len(self.shown), 0, 0))])


def run(output, *, method=None, steps=STEPS, **sections):
    """A run, held-out loss and all; returns its final weight."""
    method = method or Regression()
    usual = {
        "train": {"steps": steps, "batch_size": 3, "clip_norm": 1e9},
        "optim": {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0},
        "checkpoint": {"every": 3},
        "tracking": {"every": 2},
        "preview": {"every": 2, "prompts": ["a"], "resolution": 32},
        "validation": {"every": 2, "use_best": True},
    }
    values = {name: section | sections.get(name, {}) for name, section in usual.items()}
    config = validate(LoopConfig, values | {"output": str(output)}, where="test")
    samples = Samples(steps)
    samples.held_out = HeldOut()
    fit(method, samples, config, Accelerator(cpu=True))
    return method.model.weight.item()


def losses(output, name):
    return [(line["step"], line[name]) for line in logged(output) if name in line]


def left(output):
    """What a run leaves, but for times."""
    history = overfitting.read(output / "validation")
    return {
        "checkpoints": sorted(path.name for path in (output / "checkpoints").iterdir()),
        "best": json.loads((output / "checkpoints/best.json").read_text()),
        "history": [(one.step, one.value("loss")) for one in history],
        "loss": losses(output, "loss"),
        # A kill just after it was logged repeats the line.
        "held-out": sorted(set(losses(output, "validation/loss"))),
        "previews": sorted(path.name for path in (output / "previews").iterdir()),
    }


# Killed


POINTS = {
    "a validation's file": (Measured, "write"),
    "a line of metrics": (Trackers, "log"),
    "a checkpoint": (Checkpoints, "save"),
    "what it writes": (Checkpoints, "_write"),
    "pruning": (Checkpoints, "_prune"),
    "marking the best": (Checkpoints, "mark_best"),
    "a preview": (pauses.Previews, "render"),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "straight"
    return run(output, method=Pictured()), left(output)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, straight, point, after
):
    killed = killed_and_resumed(
        monkeypatch,
        *POINTS[point],
        lambda output: run(output, method=Pictured()),
        tmp_path,
        after=after,
    )
    ends = [(weight, left(output)) for output, weight in killed]
    assert len(ends) > 2 and all(end == straight for end in ends)


# The best


def test_previews_of_the_best_are_shown_on_dashboards_too(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Trackers, "previews", lambda self, step, previews: shown.append(step))
    run(tmp_path, method=Pictured(), preview={"every": 3}, validation={"every": 2})
    assert shown == [3, 6, 8, BEST]


@pytest.mark.parametrize("use_best", [False, True])
@pytest.mark.parametrize(
    "kind", [{}, {"train": {"ema_decay": 0.5}}, {"optim": {"name": "schedule_free"}}]
)
def test_a_run_ends_with_the_weights_that_were_shown_and_measured(tmp_path, kind, use_best):
    sections = kind | {"validation": {"use_best": use_best}}
    sections["train"] = kind.get("train", {}) | {"steps": 12}
    method = Pictured()
    weight = run(tmp_path, method=method, steps=12, **sections)
    measured = dict(losses(tmp_path, "validation/loss"))
    best = min((step for step in measured if step), key=measured.get)
    assert 0 < best < 12
    taken = best if use_best else 12
    assert method.shown[[0, 2, 4, 6, 8, 10, 12].index(taken)] == weight
    assert measured[taken] == pytest.approx((weight - AIM) ** 2, abs=1e-7)
    live = json.loads((tmp_path / "checkpoints/step-00000012/manifest.json").read_text())
    assert live["step"] == 12 and (tmp_path / f"checkpoints/step-{best:08d}").is_dir()


def test_what_was_taken_is_said_and_shown(tmp_path, capsys):
    run(tmp_path, method=Pictured(), preview={"every": 100})
    assert f"took the weights of step {BEST} (held-out loss 0.0" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "previews").iterdir()}
    assert names == {"base", f"step-{BEST:08d}", f"step-{STEPS:08d}"}


def test_with_no_finite_loss_the_last_weights_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(HeldOut, "__iter__", lambda self: iter([broken()]))
    last = run(tmp_path / "last", validation={"use_best": False})
    assert run(tmp_path / "best") == last
    assert "no held-out loss was finite" in capsys.readouterr().out


def broken():
    batch = {"x": torch.ones(16), "y": torch.full((16,), float("nan"))}
    return batch | {"row": torch.arange(16)}


def test_a_damaged_best_is_named_with_the_way_out(tmp_path):
    run(tmp_path)
    file = tmp_path / f"checkpoints/step-{BEST:08d}/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"damaged.*use_best=false ends with the last"):
        run(tmp_path)
    assert run(tmp_path, validation={"use_best": False}) > AIM + 0.2


# Previews


def test_weights_are_swapped_only_where_they_are_looked_at(tmp_path, monkeypatch):
    from train import averaging

    count = []
    restored = averaging._restored
    monkeypatch.setattr(averaging, "_restored", lambda m: (count.append(m), restored(m))[1])
    run(tmp_path, train={"ema_decay": 0.5}, validation={"every": 4}, preview={"every": 0})
    assert len(count) == 3  # steps 0, 4 and 8


def test_a_run_that_starts_anew_shows_nothing_of_another(tmp_path):
    for name in ("base", "step-00000002", "step-00000005"):
        (tmp_path / "previews" / name).mkdir(parents=True)
    run(tmp_path, method=Pictured())
    steps = [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    folders = sorted((tmp_path / "previews").iterdir())
    assert [path.name for path in folders] == ["base", *steps]
    assert all((path / "00.png").exists() for path in folders)


# Going on


def test_a_line_of_metrics_spans_a_resume(tmp_path):
    settings = {"tracking": {"every": 5}, "validation": {"every": 0}}
    run(tmp_path / "whole", **settings)
    run(tmp_path / "parts", **settings)
    for step in (6, 8):
        (tmp_path / f"parts/checkpoints/step-{step:08d}").rename(tmp_path / str(step))
    run(tmp_path / "parts", **settings)
    assert losses(tmp_path / "parts", "loss") == losses(tmp_path / "whole", "loss")
    assert [step for step, _ in losses(tmp_path / "parts", "loss")] == [5, 8]


def test_a_process_that_does_not_see_the_checkpoint_does_not_go_on(tmp_path, monkeypatch):
    """The first process, on another machine, has found one of step 2."""
    monkeypatch.setattr(loop, "broadcast_object_list", lambda found: [(2, None)])
    with pytest.raises(RunFailed, match=r"process 0 does not see .*step-00000002.*output="):
        loop.restore(Checkpoints(tmp_path, keep=2), None, None, None, Accelerator(cpu=True))


def test_damage_that_the_first_process_finds_is_raised_in_all(tmp_path, monkeypatch):
    damage = DamagedCheckpoint("every checkpoint is damaged")
    monkeypatch.setattr(loop, "broadcast_object_list", lambda found: [(0, damage)])
    with pytest.raises(DamagedCheckpoint, match="every"):
        loop.restore(Checkpoints(tmp_path, keep=2), None, None, None, Accelerator(cpu=True))
