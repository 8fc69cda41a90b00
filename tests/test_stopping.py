"""Signals, as one process takes note of them; tests/faults has those of real runs."""

import json
import os
import signal
from types import SimpleNamespace

import pytest

from train import stopping
from train.config import RunFailed
from train.stopping import Agreement, Interrupted, checking, forking, jointly, listening

ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture(autouse=True)
def handlers():
    """None ignored, as a background job would have it; and afterwards as they were, for a run that
    was asked to end leaves its process deaf."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGUSR1, 138),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
    ],
)
def test_a_signal_is_noted_and_told_of_where_it_ends_the_run(tmp_path, capfd, number, code):
    with pytest.raises(Interrupted) as ended, listening(tmp_path):
        stopping.check()
        ask(number)
        assert stopping.asked() == number
        try:
            stopping.check()
        except Interrupted as interrupted:
            interrupted.step = 7
            raise
    assert ended.value.code == code
    said = json.loads((tmp_path / "interrupted.json").read_text())
    assert said.pop("time")
    assert said == {"signal": signal.Signals(number).name, "exit_code": code, "step": 7}
    assert "the checkpoint of step 7 is saved" in capfd.readouterr().out
    assert not list(tmp_path.glob(".writing-*"))
    ask(number)  # on its way out it hears no more
    assert stopping.asked() == 0


def test_a_signal_after_which_nothing_asks_changes_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with listening(tmp_path):
        ask()
    assert signal.getsignal(signal.SIGTERM) == before
    assert stopping.asked() == 0 and not list(tmp_path.iterdir())


def test_what_whoever_started_it_has_it_ignore_stays_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with listening(tmp_path):
        ask(signal.SIGHUP)
        assert stopping.asked() == 0
        ask(signal.SIGTERM)
        assert stopping.asked() == signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_first_signal_counts_and_is_answered_once(tmp_path, capfd):
    with listening(tmp_path):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            ask(number)
        assert stopping.asked() == signal.SIGUSR1
    assert capfd.readouterr().err == "\nSIGUSR1: saving a checkpoint and ending\n"


def test_only_the_first_process_tells(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Interrupted), listening(tmp_path):
        ask()
        stopping.check()
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_what_is_forked_within_begins_deaf():
    def deaf():
        return signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(stopping.SIGNALS)

    before = deaf()
    with pytest.raises(KeyError), forking():
        assert deaf() == set(stopping.SIGNALS)
        raise KeyError
    assert deaf() == before


def test_work_stops_where_it_tells_of_its_progress(tmp_path):
    seen = []

    def work():
        show = checking(lambda done, total: seen.append(done))
        for done in range(1, 5):
            if done == 3:
                ask()
            show(done, 4)

    with pytest.raises(Interrupted, match="SIGTERM"), listening(tmp_path):
        jointly(ALONE, work)
    assert seen == [1, 2]
    assert jointly(ALONE, lambda: 5) == 5


def test_who_is_asked_while_it_works_ends_after_it(tmp_path):
    with pytest.raises(Interrupted), listening(tmp_path):
        jointly(ALONE, ask)
    with pytest.raises(KeyError):  # whatever else goes wrong is as it was
        jointly(ALONE, lambda: {}["nothing"])


def test_one_process_agrees_with_itself(tmp_path):
    agreement = Agreement(ALONE)
    agreement.wait()
    assert agreement.most(3, 0, 2) == [3, 0, 2]
    with pytest.raises(Interrupted), listening(tmp_path):
        agreement.check()
        ask()
        agreement.check()


@pytest.mark.parametrize(
    "error",
    [
        "[/torch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:29",
        "NCCL communicator was aborted: remote process exited or there was a network error",
    ],
)
def test_that_another_process_has_gone_is_said_in_a_line(tmp_path, error):
    with pytest.raises(RunFailed, match=r"has gone \((Connection|remote)"):
        with listening(tmp_path):
            raise RuntimeError(error)


@pytest.mark.parametrize("error", [RuntimeError("shape"), RunFailed("full"), ValueError("peer")])
def test_other_errors_are_themselves(tmp_path, error):
    with pytest.raises(type(error)) as raised, listening(tmp_path):
        raise error
    assert raised.value is error
