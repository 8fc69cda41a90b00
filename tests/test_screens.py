"""What commands show: their three ways, first and last screens, progress."""

import ast
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch

from tests.runs import ROOT, arguments, finish, launch, make_world
from train import (
    base_layers,
    expectation,
    first_screen,
    last_screen,
    lora,
    pictures,
    rundir,
    screens,
)
from train.config import LoraRun, ModelConfig, RunConfig, Section, load
from train.meter import Meter
from train.run_record import Run
from train.screens import Way


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run as a program sees it: its folder and its events."""
    output = tmp_path_factory.mktemp("runs") / "run"
    said = finish(launch("train/lora.py", "--json", *arguments(world, output), "tracking.every=2"))
    events = [json.loads(line) for line in said.splitlines() if line.startswith('{"event"')]
    return output, events, said


SHORT = ("preview.every=0", "optim.warmup_steps=0")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_flags_are_found_anywhere_and_taken_out():
    rest, way = screens.split(["--quiet", "a=b", "--no-color", "--config", "f.yaml", "--json"])
    assert rest == ["a=b", "--config", "f.yaml"]
    assert way == Way(quiet=True, json=True, colour=False)


def test_quiet_leaves_the_result_alone(capsys):
    with screens.speaking(Way(quiet=True)):
        print("said by others")
        screens.screen("title", [("label", "text")])
        screens.bar(3, "work").update(3)
        screens.done("runs/a/adapter")
    assert capsys.readouterr() == ("runs/a/adapter\n", "")


def test_json_is_all_that_stdout_has(capsys):
    with screens.speaking(Way(json=True)):
        print("said by others")
        screens.warn("look")
        screens.done("runs/a", loss=0.5)
    out, err = capsys.readouterr()
    first, last = map(json.loads, out.splitlines())
    assert first == {"event": "warning", "text": "look"}
    assert last == {"event": "done", "result": "runs/a", "loss": 0.5}
    assert err.splitlines() == ["said by others", "warning: look"]


def test_a_command_that_says_nothing_of_its_end_is_done_all_the_same(capsys):
    with screens.speaking(Way(json=True)):
        pass
    assert json.loads(capsys.readouterr().out) == {"event": "done"}


def test_other_processes_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with screens.speaking(Way(json=True)):
        screens.say("text")
        screens.done("result")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("off", ["NO_COLOR", "flag", None])
def test_bold_is_for_terminals_that_want_it(monkeypatch, off):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if off == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Terminal())
    with screens.speaking(Way(colour=off != "flag")):
        screens.screen("title", [("label", "text")])
    assert ("\033[1mtitle" in sys.stdout.getvalue()) == (off is None)


def test_a_terminal_s_rows_are_wrapped_but_for_commands(monkeypatch, capsys):
    rows = [("data", "word " * 40), ("", "x" * 150)]
    screens.screen("title", rows)
    assert len(capsys.readouterr().out.splitlines()) == 4
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", Terminal())
    screens.screen("title", rows)
    lines = sys.stdout.getvalue().splitlines()[1:]
    assert lines[1].startswith("data     word") and lines[2].startswith("         word")
    assert max(map(len, lines[:-1])) <= 100 and lines[-1] == f"         {'x' * 150}"


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(screens.time, "monotonic", lambda: next(clock))
    with screens.bar(100, "caching latents", unit="pictures") as bar:
        for _ in range(4):
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "caching latents: 20 of 100 pictures, about 2 min left",
        "caching latents: 40 of 100 pictures, about 93 s left",
    ]


def test_on_a_terminal_it_is_a_bar_with_what_is_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = screens.bar(4, "held-out loss", unit="batches", delay=0)
    bar.update(2)
    bar.refresh()
    text = sys.stderr.getvalue()
    bar.close()
    assert "held-out loss:  50 %" in text and "2/4 batches" in text and "left" in text


def test_a_sign_of_life_is_erased_before_the_next_text(monkeypatch):
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    monkeypatch.setattr(screens, "_TICK", 0.05)
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with screens.working("at once"):
            pass
        with screens.working("loading base"):
            time.sleep(0.2)
        terminal.write("NEXT")
        terminal.flush()
        text = ""
        while not text.endswith("NEXT"):
            text += os.read(mine, 10_000).decode()
    os.close(mine)
    assert "loading base: 00:0" in text and "at once" not in text
    assert re.search(r"\r +\r(\x1b\[A)?NEXT$", text), text


def test_time_aside_is_not_in_what_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(screens.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    here = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))
    meter = Meter(here, SimpleNamespace(), steps=100, start=0, every=50)  # type: ignore[arg-type]
    with meter.aside():
        clock[0] += 1000
    clock[0] += 40
    meter._bar.n = 50
    assert meter._bar._line(clock[0] - meter._bar.start_t).endswith("about 40 s left")


class Full(io.StringIO):
    """A log on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        self.write("")


def test_a_run_goes_on_though_nothing_of_it_can_be_said(world, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(screens, "LINE_EVERY", 0.0)
    lora.main(arguments(world, tmp_path / "run", "train.steps=1", *SHORT))
    assert (tmp_path / "run/adapter").is_dir()
    with pytest.raises(OSError):  # another command does not
        screens.say("text")


def test_what_stays_in_a_full_stream_makes_no_failure_of_the_end():
    body = "from train import screens\nwith screens.unheard(): print('text')"
    with open("/dev/full", "w") as full:
        run = [sys.executable, "-c", body]
        assert subprocess.run(run, stdout=full, stderr=full, cwd=ROOT).returncode == 0


def test_ctrl_c_at_a_question_is_no_traceback(monkeypatch, capsys):
    from train import parsing

    def asks(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["entry"])
    with pytest.raises(SystemExit) as ended:
        parsing.command(asks)
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "\n")


TRAINS = {"lora", "dreambooth", "textual_inversion", "full"}  # their plan's _ending does it


def test_every_command_says_what_it_has_done():
    files = [*ROOT.glob("train/*.py"), *ROOT.glob("eval/*.py"), *ROOT.glob("scripts/*.py")]
    entries = [file for file in files if "\n    command(main)\n" in file.read_text()]
    assert len(entries) >= 18
    for file in entries:
        nodes = ast.walk(ast.parse(file.read_text()))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert file.stem in TRAINS or calls & {"screens.done", "done"}, file


@pytest.mark.parametrize(
    "seconds, said", [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min"), (5990, "1 h 40 min")]
)
def test_durations(seconds, said):
    assert screens.duration(seconds) == said


def test_the_first_screen_says_what_trains_on_what_and_for_how_long(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(expectation, "cpu_rate", lambda: 1e9)
    monkeypatch.setattr(expectation, "gpu_name", lambda: None)
    lora.main(arguments(world, tmp_path / "run", "dry_run=true"))
    lines = capsys.readouterr().out.splitlines()
    labels = [line[:9].strip() for line in lines[2:-1]]
    wanted = "trains base data found steps update expected saves output".split()
    assert [label for label in labels if label in wanted] == wanted
    assert len(lines) <= 17 and "LoRA rank 2 on the UNet (attention): " in lines[2]
    assert re.search(r": [\d,.k ]+ of [\d.k M]+ parameters", lines[2])
    assert "9 pictures in " in "\n".join(lines) and lines[-1].startswith("dry run")


def test_the_parameters_are_those_that_train(world, run):
    from safetensors.torch import load_file

    config = load(LoraRun, arguments(world, run[0]))
    file = load_file(run[0] / "adapter/pytorch_lora_weights.safetensors")
    assert first_screen.adapter_numbers(config.lora, config.model) == sum(
        tensor.numel() for tensor in file.values()
    )


def test_events_of_a_run_are_the_plan_its_steps_and_its_result(run):
    output, events, _ = run
    names = [event["event"] for event in events]
    assert names[0] == "plan" and names[-1] == "done" and set(names[1:-1]) == {"step"}
    assert [event["step"] for event in events[1:-1]] == [2, 4, 6]
    assert events[0]["pictures"] == 9 and events[-1]["result"] == str(output / "adapter")
    assert events[-1]["loss"] == events[-2]["loss"]


def test_the_last_screen_has_the_result_and_commands_that_name_it(run):
    output, _, said = run
    shown = said[said.index("LoRA finished") :]
    assert f"result   {output / 'adapter'}" in shown and "images/s while training" in shown
    assert f'pipeline.load_lora_weights("{output / "adapter"}")' in shown
    assert f"python scripts/export.py run={output} format=kohya output=run.safetensors" in shown
    assert f"eval/evaluate.py run={output}" in shown


def test_a_finished_run_shows_it_again(world, run, capsys):
    lora.main([*arguments(world, run[0]), "tracking.every=2"])
    shown = capsys.readouterr().out
    assert "is finished" in shown and "LoRA finished" in shown and "load_lora_weights" in shown


def test_a_stopped_run_says_how_it_goes_on(world, tmp_path, capsys):
    config = load(LoraRun, arguments(world, tmp_path / "run"))
    rundir.create(config, {})
    last_screen.stopped(config, 4)
    shown = capsys.readouterr().out
    assert "step 4 of 6" in shown
    assert f"accelerate launch train/lora.py --config {tmp_path / 'run/config.yaml'}" in shown


class OwnMethod(Section):
    """A method of one's own."""


class OwnRun(RunConfig):
    own: OwnMethod = OwnMethod()


def test_a_method_of_one_s_own_goes_by_its_name(world, tmp_path, capsys):
    given = [word for word in arguments(world, tmp_path / "run") if "--config" not in word]
    config = load(OwnRun, [*given, "train.steps=2"])
    assert first_screen.method(config) == "Own"
    assert first_screen.trains(config) == "weights of its own"
    last_screen.stopped(config, None)
    assert "or:" not in capsys.readouterr().out


@pytest.mark.parametrize("off", ["tracking.mode=disabled", "WANDB_MODE"])
def test_a_dashboard_that_is_off_is_not_named(world, tmp_path, monkeypatch, off):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    given = arguments(world, tmp_path / "run", "tracking.trackers=[wandb]")
    assert "also on wandb" in first_screen.output(load(LoraRun, given))
    if off == "WANDB_MODE":
        monkeypatch.setenv(off, "disabled")
    else:
        given.append(off)
    assert "wandb" not in first_screen.output(load(LoraRun, given))


def test_commands_are_quoted_for_the_shell(world, tmp_path):
    config = load(LoraRun, arguments(world, tmp_path / "my run"))
    rundir.create(config, {})
    shown = "\n".join(text for _, text in last_screen.use(Run.read(config.output, {})))
    assert f"run='{tmp_path}/my run'" in shown and "prompt='" in shown


def test_a_mistake_is_an_event_with_its_exit_code(tmp_path):
    said = finish(launch("train/lora.py", "--json", "lora.rnk=3"), code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    assert json.loads(line)["exit_code"] == 2 and "lora.rank" in json.loads(line)["message"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_memory_of_a_long_run_is_foreseen_and_not_being_able_to_stops_nothing(
    world, tmp_path, monkeypatch, fails
):
    config = load(LoraRun, arguments(world, tmp_path / "run"))
    found = pictures.find(config.data)
    monkeypatch.setattr(expectation, "gpu_name", lambda: None)
    monkeypatch.setattr(expectation, "cpu_rate", lambda: 1e14)
    assert expectation.of(config, found) == []  # over at once
    monkeypatch.setattr(expectation, "cpu_rate", lambda: 1e6)
    if fails:
        monkeypatch.setattr("train.footprint.predict", lambda *_, **__: 1 / 0)
    (long,) = expectation.of(config, found)
    assert "of training" in long and long.endswith("on this CPU")
    assert ("GiB of memory at most on this CPU" in long) is not fails
    (config.output / "checkpoints/step-00000002").mkdir(parents=True)
    monkeypatch.setattr("train.footprint.predict", None)
    (resumed,) = expectation.of(config, found)
    assert "of training on this CPU" in resumed


def test_on_a_card_nothing_heavy_is_done_for_a_short_run(world, tmp_path, monkeypatch):
    config = load(LoraRun, arguments(world, tmp_path / "run", "train.mixed_precision=bf16"))
    found = pictures.find(config.data)
    monkeypatch.setattr(expectation, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("train.flops.count", None)
    monkeypatch.setattr("train.architecture.Architecture.of", None)
    assert expectation.of(config, found) == []
    counted = expectation.training_seconds(config, found, "NVIDIA H100 80GB HBM3")
    assert counted is not None and 0 < counted < 5
    monkeypatch.setattr(expectation.flops, "peak_flops", lambda *_, **__: 1e8)
    (said,) = expectation.of(config, found)
    assert "of training on NVIDIA H100" in said and "memory" not in said


@pytest.mark.parametrize("side, counted", [(768, 2149.1e9), (512, 804e9)])
def test_the_arithmetic_is_counted_within_a_sixth(side, counted):
    """Against what torch counts of the whole UNet (docs/planning.md)."""
    layers = base_layers.unet_layers(base_layers.SD21_UNET)
    assert expectation.unet_flops(layers, (side, side)) == pytest.approx(counted, rel=1 / 6)


def test_a_base_of_unusual_blocks_is_expected_nothing_of(world, tmp_path, monkeypatch):
    from train import pictures

    config = load(LoraRun, arguments(world, tmp_path / "run"))
    found = pictures.find(config.data)
    monkeypatch.setattr(base_layers, "of_base", lambda model: None)
    monkeypatch.setattr(expectation, "gpu_name", lambda: None)
    assert expectation.of(config, found) == []
    assert first_screen.unet_numbers(ModelConfig(path="nobody/nothing")) is None
