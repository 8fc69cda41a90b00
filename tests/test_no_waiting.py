"""Nothing in a training step waits for the device: none of its operations needs a number."""

import traceback

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.faults.chains import command
from tests.runs import make_world
from train import dreambooth, full, lora, textual_inversion

# What gives the host a number, or a tensor whose size depends on numbers.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"}
# Where a step is at work, and what may wait within: a line of metrics, and the guard's late look.
STEP = {"accumulate", "clip_grad_norm_", "update", "zero_grad", "record", "step"}
ALLOWED = {"_log", "settled", "state", "after", "before"}


class Waits(TorchDispatchMode):
    """Collects where a step waits."""

    def __init__(self):
        super().__init__()
        self.places, self.seen = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.seen += 1
        if name in WAITING:
            frames = traceback.extract_stack()
            names = {frame.name for frame in frames}
            if names & STEP and not names & ALLOWED and "fit" in names:
                ours = [f for f in frames if "/train/" in f.filename or "/data/" in f.filename]
                self.places.append((name, ours[-1].filename, ours[-1].lineno))
        return operation(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(name, world, output, *overrides):
    """A run of some method, as a GPU's guard would do it."""
    entry, *given = command(name, world, output)
    mains = {"lora": lora, "dreambooth": dreambooth, "full": full}
    of = mains.get(entry.removeprefix("train/").removesuffix(".py"), textual_inversion)
    of.main([*given, "validation.every=0", "checkpoint.every=6", "data.workers=1", *overrides])


PREDICTED = ("dreambooth.prior=prediction", "dreambooth.class_path=null")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("lora", ("lora.dropout=0.1", "train.micro_batch_size=2", "train.ema_decay=0.9")),
        ("lora", ("diffusion.min_snr_gamma=5", "train.gradient_checkpointing=true")),
        ("dreambooth", PREDICTED),
        ("textual inversion", ()),
        ("full", ()),
    ],
)
def test_no_step_waits_for_the_device(world, tmp_path, monkeypatch, name, overrides):
    monkeypatch.setattr("train.guards.can_be_late", lambda *_: True)
    with Waits() as waits:
        run(name, world, tmp_path / "run", *overrides)
    assert waits.seen > 1000
    assert not waits.places


def test_a_guard_that_looks_at_each_step_would_be_found(world, tmp_path):
    with Waits() as waits:
        run("lora", world, tmp_path / "run")
    assert any("guards.py" in file for _, file, _ in waits.places)
