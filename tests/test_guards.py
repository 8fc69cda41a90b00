"""Which steps are left out, and what is said of memory that does not suffice."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from train.config import LoraRun, RunFailed, load
from train.guards import (
    LateGuard,
    PromptGuard,
    Seen,
    guard_of,
    heeds_found_inf,
    is_out_of_memory,
    memory_named,
)
from train.stopping import Agreement

FINE, NAN, HUGE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


class Counted(Agreement):
    """One process; how often it met the others."""

    met = 0

    def most(self, *mine):
        self.met += 1
        return super().most(*mine)


class Scaler:
    """As accelerate has one for fp16."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale

    def update(self):
        self.scale /= 2


def guard(allowed=5, before=None, scaler=None):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
    found = guard_of(accelerator, Counted(accelerator), optimizer, allowed=allowed, before=before)
    assert isinstance(found, PromptGuard)
    return found


def passes(one, done, seen, norm, optimizer):
    """Whether the step was taken."""
    called = []
    optimizer.step = lambda: called.append(done)
    assert one.step(done, seen, norm, optimizer).item() == len(called)
    return bool(called)


def seen(*losses):
    """A step of micro-batches of two samples: a and b, c and d, and so on."""
    names = iter("abcdefghijklmnopqrstuvwxyz")
    batches = [([next(names), next(names)], torch.tensor(pair)) for pair in losses]
    return Seen(sum(pair.sum() for _, pair in batches), batches)


GOOD, BAD = seen((1.0, 2.0)), seen((1.0, 2.0), (3.0, float("nan")))
PLAIN = SimpleNamespace()


def test_a_step_is_left_out_for_its_loss_and_the_sample_named(capsys):
    one = guard()
    assert passes(one, 1, GOOD, FINE, PLAIN)
    assert not passes(one, 2, BAD, FINE, PLAIN)
    assert "warning: step 2 is left out: the loss is not finite for d\n" in capsys.readouterr().out


@pytest.mark.parametrize("norm", [NAN, HUGE, float("nan")])
def test_a_step_is_left_out_for_its_gradient(capsys, norm):
    assert not passes(guard(), 3, GOOD, norm, PLAIN)
    assert "the gradient is not finite; the step has a, b\n" in capsys.readouterr().out


def test_a_step_that_the_optimizer_left_out_is_counted():
    one = guard()
    assert not passes(one, 1, GOOD, FINE, SimpleNamespace(overflow=True))
    assert passes(one, 2, GOOD, FINE, SimpleNamespace(overflow=False))
    assert one.state() == {"in_a_row": 0, "left_out": 1}


def test_so_many_in_a_row_and_no_more_are_left_out():
    one = guard(allowed=2)
    for _ in range(3):
        assert not passes(one, 1, BAD, FINE, PLAIN) and not passes(one, 2, GOOD, NAN, PLAIN)
        assert passes(one, 3, GOOD, FINE, PLAIN)
    assert one.state() == {"in_a_row": 0, "left_out": 6}
    assert not passes(one, 1, BAD, FINE, PLAIN) and not passes(one, 2, BAD, FINE, PLAIN)
    again = guard(allowed=2, before=one.state())
    with pytest.raises(RunFailed, match=r"step 3: .* for d; it is number 3 in a row \(train.skip"):
        passes(again, 3, BAD, FINE, PLAIN)


def test_of_many_samples_some_are_named(capsys):
    bad = (float("nan"), float("nan"))
    assert not passes(guard(), 1, seen(*[bad] * 8), FINE, PLAIN)
    assert "for a, b, c, d, e, f, g, h, i, j, k, l and 4 more\n" in capsys.readouterr().out


def test_what_is_too_large_for_fp16_is_left_to_its_scaler():
    scaler = Scaler(65536.0)
    one = guard(scaler=scaler)
    assert passes(one, 1, GOOD, HUGE, PLAIN) and scaler.scale == 65536  # which it will lower
    assert not passes(one, 2, BAD, NAN, PLAIN) and scaler.scale == 32768
    scaler.scale = 0.5  # that was not why
    assert not passes(one, 3, GOOD, HUGE, PLAIN)
    assert one.state() == {"in_a_row": 2, "left_out": 2}


def test_all_processes_meet_as_often_whatever_each_has_seen():
    for scaler in (None, Scaler(65536.0), Scaler(0.5)):
        for losses in (GOOD, BAD):
            for norm in (FINE, NAN):
                one = guard(scaler=scaler)
                passes(one, 1, losses, norm, PLAIN)
                assert one._agreement.met == 1


STEPS = [(GOOD, FINE), (BAD, FINE), (GOOD, NAN), (GOOD, FINE), (BAD, NAN), (GOOD, HUGE)]


def trained(late, steps, monkeypatch, allowed=5):
    """A weight, its optimizer's state, and the guard after some steps of gradient 1."""
    monkeypatch.setattr("train.guards.can_be_late", lambda *_: late)
    weight, bias = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0, "lr": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = None
    one = guard_of(accelerator, Counted(accelerator), optimizer, allowed=allowed)
    assert isinstance(one, LateGuard if late else PromptGuard)
    taken = []
    for done, (losses, norm) in enumerate(steps, 1):
        for one_of in (weight, bias):
            one_of.grad = torch.ones(3) * (1 if norm is FINE and losses is GOOD else NAN)
        taken.append(one.step(done, losses, norm, optimizer).item())
    both = torch.cat([weight, bias]).detach()
    return both, dict(optimizer.state[weight]), taken, one


def test_what_the_device_leaves_out_is_what_the_host_would(monkeypatch, capsys):
    weight, state, taken, prompt = trained(False, STEPS, monkeypatch)
    warned = capsys.readouterr().out
    late_weight, late_state, late_taken, late = trained(True, STEPS, monkeypatch)
    assert not capsys.readouterr().out  # nothing was looked at yet
    assert torch.equal(weight, late_weight) and taken == late_taken == [1, 0, 0, 1, 0, 0]
    assert all(torch.equal(state[name], late_state[name]) for name in state)
    assert late.settled() == prompt.settled() == 4
    assert late.state() == prompt.state() == {"in_a_row": 2, "left_out": 4}
    assert capsys.readouterr().out == warned and "step 2 is left out: the loss is" in warned


def test_a_checkpoint_is_never_made_of_steps_that_were_not_looked_at(monkeypatch):
    *_, late = trained(True, STEPS, monkeypatch, allowed=1)
    with pytest.raises(RunFailed, match="step 3: the gradient is not finite.*number 2 in a row"):
        late.state()


def test_the_host_looks_after_64_steps_at_the_latest(monkeypatch):
    with pytest.raises(RunFailed, match="step 3: "):
        trained(True, STEPS + [(GOOD, FINE)] * 60, monkeypatch, allowed=1)


def test_only_who_leaves_out_steps_by_itself_is_trusted_with_it():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    assert heeds_found_inf(torch.optim.AdamW(parameters, fused=True))
    assert not heeds_found_inf(torch.optim.AdamW(parameters))
    assert not heeds_found_inf(torch.optim.SGD(parameters, fused=True))


class Kept:
    """Checkpoints of which the last is written by the time it is waited for."""

    def __init__(self, *steps, fails=False):
        self.kept, self.fails, self.waited, self.writes = list(steps), fails, False, True

    def wait(self):
        self.waited = True
        if self.fails:
            raise RunFailed("the disk is full")

    def steps(self):
        return self.kept if self.waited else self.kept[:-1]


def named(error, checkpoints, *overrides):
    config = load(LoraRun, ["output=run", "data.path=pictures", "optim.name=adamw", *overrides])
    with pytest.raises(RunFailed) as raised:
        with memory_named(checkpoints, config, Accelerator(cpu=True)):
            raise error
    return str(raised.value)


@pytest.mark.parametrize("fails", [False, True])
def test_memory_that_does_not_suffice_is_said_with_a_remedy(fails):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    sizes = ("train.batch_size=8", "train.micro_batch_size=4")
    assert named(error, Kept(2, 4, fails=fails), *sizes) == (
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); the checkpoint of step 4 "
        "is kept. The same command goes on with train.micro_batch_size=2 in place of 4, which "
        "leaves the batch as large, and train.gradient_checkpointing=true, which only takes time. "
        "A new output= needs less with optim.name=adamw8bit or a smaller data.resolution"
    )


def test_what_is_as_low_as_it_can_be_is_not_named():
    lowest = ("train.micro_batch_size=1", "train.gradient_checkpointing=true")
    said = named(MemoryError(), Kept(), *lowest, "optim.name=adamw8bit")
    assert said == (
        "out of memory (MemoryError); there is no checkpoint yet. A new output= needs less with a "
        "smaller data.resolution"
    )


def test_torch_s_own_allocator_is_heard():
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape"))


def test_other_errors_are_themselves():
    with pytest.raises(RuntimeError, match="^shape$"):
        with memory_named(Kept(2), None, None):
            raise RuntimeError("shape")
