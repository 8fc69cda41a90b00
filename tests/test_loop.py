"""The loop against a method small enough to compute by hand."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from train.config import LoopConfig, RunFailed, validate
from train.loop import fit, images_in
from train.pauses import due


class Regression:
    """One weight w, per-sample loss (w x - y)^2."""

    def __init__(self):
        self.model = Line()

    def parameter_groups(self, config):
        return [{"params": [self.model.weight]}]

    def pipeline(self):
        return None

    def export(self, directory):
        pass


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.noise = []

    def forward(self, batch):
        self.noise.append(float(torch.rand(())))
        return (self.weight * batch["x"] - batch["y"]).square()


class Samples:
    """Three samples per step, cut into two unequal micro-batches."""

    held_out = None

    def epochs(self, steps):
        return steps / 2

    def work(self, micro_batches):
        return 0.0

    def __init__(self, steps, cuts=(2, 1)):
        self.steps, self.cuts = steps, cuts

    def __call__(self, start):
        for step in range(start, self.steps):
            x = torch.tensor([1.0, 2.0, 3.0]) + step
            batch = {"x": x, "y": 2 * x, "weight": torch.full((3,), 1 / 3)}
            rows = torch.arange(3).split(self.cuts)
            yield [{name: value[row] for name, value in batch.items()} for row in rows]


def config(output, steps=4, **optim):
    values = {
        "output": str(output),
        "train": {"steps": steps, "batch_size": 3, "clip_norm": 1e9},
        "optim": {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0, **optim},
        "checkpoint": {"every": 2},
        "tracking": {"every": 1},
    }
    return validate(LoopConfig, values, where="test")


def logged(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_loss_and_gradient_are_means_over_the_global_batch(tmp_path):
    fit(Regression(), Samples(1), config(tmp_path, steps=1), Accelerator(cpu=True))
    (line,) = logged(tmp_path)
    x = torch.tensor([1.0, 2.0, 3.0])
    assert line["loss"] == pytest.approx(float((1.5 * x).square().mean()))
    assert line["grad_norm"] == pytest.approx(float((2 * 1.5 * x.square()).mean()))


@pytest.mark.parametrize("cuts", [(3,), (1, 2), (1, 1, 1)])
def test_how_the_batch_is_cut_does_not_matter(tmp_path, cuts):
    reference, other = Regression(), Regression()
    fit(reference, Samples(4), config(tmp_path / "a"), Accelerator(cpu=True))
    fit(other, Samples(4, cuts), config(tmp_path / "b"), Accelerator(cpu=True))
    assert other.model.weight.item() == pytest.approx(reference.model.weight.item(), abs=1e-7)


def test_a_stopped_run_continues_where_it_was_with_the_same_randomness(tmp_path):
    whole = Regression()
    fit(whole, Samples(4), config(tmp_path / "whole"), Accelerator(cpu=True))
    first, second = Regression(), Regression()
    fit(first, Samples(2), config(tmp_path / "parts"), Accelerator(cpu=True))
    fit(second, Samples(4), config(tmp_path / "parts"), Accelerator(cpu=True))
    assert torch.equal(second.model.weight, whole.model.weight)
    assert first.model.noise + second.model.noise == whole.model.noise
    assert [line["loss"] for line in logged(tmp_path / "parts")] == [
        line["loss"] for line in logged(tmp_path / "whole")
    ]


def test_the_gradient_is_clipped_at_the_norm(tmp_path):
    settings = config(tmp_path, steps=1, name="adamw")
    settings.train.clip_norm = 0.5
    method = Regression()
    fit(method, Samples(1), settings, Accelerator(cpu=True))
    state = json.loads((tmp_path / "checkpoints/step-00000001/manifest.json").read_text())
    from safetensors.torch import load_file

    moments = load_file(tmp_path / "checkpoints/step-00000001/optimizer.safetensors")
    assert state["step"] == 1
    assert float(moments["weight/exp_avg"]) == pytest.approx(-0.5 * 0.1, rel=1e-4)


def test_due_at_every_interval_and_at_the_end():
    assert [done for done in range(1, 8) if due(done, 3, 7)] == [3, 6, 7]
    assert not any(due(done, 0, 7) for done in range(1, 8))


def test_padding_does_not_count_as_images():
    weights = torch.tensor([1 / 3, 1 / 3, 0.0])
    assert images_in([{"weight": weights}, {"weight": torch.ones(2)}]) == 4
    assert images_in([{"weight": torch.zeros(2)}]) == 0


class Spoiled(Regression):
    """Its loss is not a number at the steps of `bad`, counted from 1; of `weights`, a weight."""

    def __init__(self, bad=(), weights=()):
        super().__init__()
        self.batches = 0

        def spoil(module, arguments, losses):
            self.batches += 1
            step = 1 + (self.batches - 1) // 2  # of two micro-batches
            if step in weights:
                module.weight.data.fill_(float("nan"))
            return losses * float("nan") if step in bad else losses

        self.model.register_forward_hook(spoil)


def test_a_step_whose_loss_is_not_finite_is_left_out_and_named(tmp_path, capsys):
    settings = config(tmp_path / "spoiled", steps=4)
    spoiled, sound = Spoiled(bad=[2, 4]), Spoiled()
    fit(spoiled, Samples(4), settings, Accelerator(cpu=True))
    assert "step 2 is left out: the loss is not finite for 0, 1" in capsys.readouterr().out
    lines = logged(tmp_path / "spoiled")
    assert [line["loss"] is None for line in lines] == [False, True, False, True]
    assert [line.get("left_out", 0) for line in lines] == [0, 1, 1, 2]
    fit(sound, Samples(4), config(tmp_path / "sound", steps=4), Accelerator(cpu=True))
    assert spoiled.model.weight.isfinite().all()
    assert not torch.equal(spoiled.model.weight, sound.model.weight)


def test_a_run_that_diverges_ends_after_so_many_steps_in_a_row(tmp_path):
    settings = config(tmp_path, steps=20)
    settings.train.skip_non_finite = 3
    with pytest.raises(RunFailed, match="step 8: .*number 4 in a row.*skip_non_finite=3"):
        fit(Spoiled(bad=[2, 3, 5, 6, 7, 8]), Samples(20), settings, Accelerator(cpu=True))
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_how_many_were_left_out_in_a_row_outlives_a_kill(tmp_path):
    settings = config(tmp_path, steps=20)
    settings.train.skip_non_finite = 3
    killed = config(tmp_path, steps=20)
    killed.train.skip_non_finite = 1  # ends at 4, with the checkpoint of 2 that 1 was left out
    for run, end in ((killed, "step 3"), (settings, "step 5")):
        with pytest.raises(RunFailed, match=f"{end}: "):
            fit(Spoiled(bad=range(2 if run is killed else 1, 20)), Samples(20), run, Accelerator())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(RunFailed, match="weight is not finite; the checkpoint of step 2 is intact"):
        fit(Spoiled(weights=[3]), Samples(8), config(tmp_path, steps=8), Accelerator(cpu=True))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
