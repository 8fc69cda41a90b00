"""Case 9: a signal asks a run to end, wherever it is, one of its processes, all, or its launcher ->
it saves one checkpoint of the step it has come to, ends with a code that says why, leaves no
process behind, and the same command ends in the same bits."""

import signal
import time
from pathlib import Path

import pytest

from tests.faults.chains import newest
from tests.faults.endings import (
    SPARSE,
    by_itself,
    ended_by,
    finished,
    interruption,
    nothing_lives,
    same_end,
    steps,
)
from tests.faults.injected import Fault, record, recorded
from tests.faults.removals import Removal
from tests.faults.spoiled import spoiled
from tests.runs import arguments
from tests.tiny import tiny_clip

WITHOUT = [
    Removal(
        "signals are taken note of",
        "train/stopping.py",
        "        signal.signal(number, _note)",
        "        pass",
        "everywhere",
    ),
    Removal(
        "a checkpoint is saved for them",
        "train/pauses.py",
        "        if done:\n            self._save(done)\n",
        "        if done:\n",
        "everywhere",
    ),
    Removal(
        "all processes agree",
        "train/stopping.py",
        "        if number := self.most(asked())[0]:",
        "        if number := asked():",
        "one_process_of_two",
    ),
    Removal(
        "caching asks between batches",
        "train/stopping.py",
        "        check()\n        progress(done, total)",
        "        progress(done, total)",
        "caching_of_another",
    ),
    Removal(
        "who caches learns that another was asked",
        "train/stopping.py",
        "    if number := asked() or _asked_elsewhere():",
        "    if number := asked():",
        "caching_of_another",
    ),
    Removal(
        "who waits tells who caches",
        "train/stopping.py",
        "                _post(_ASKED, asked())\n",
        "",
        "caching_of_another",
    ),
    Removal(
        "the loader's processes ignore them",
        "data/loader.py",
        "    stopping.ignore(parent)",
        "    import signal\n\n    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)",
        "whole_group",
    ),
    Removal(
        "from the very first",
        "data/loader.py",
        "    with stopping.forking():\n        made",
        "    if True:\n        made",
        "just_begins",
    ),
    Removal(
        "a validation asks between batches",
        "train/validation.py",
        "                check()\n",
        "",
        "everywhere",
    ),
    Removal(
        "previews ask between pictures",
        "train/previews.py",
        "                check()\n",
        "",
        "everywhere",
    ),
    Removal(
        "what makes pictures to be scored asks between them",
        "eval/generation.py",
        "            stopping.check()\n",
        "",
        "examination",
    ),
    Removal(
        "who examines agrees",
        "train/examination.py",
        "    if asked := max(number for number, _, _ in said):\n        raise Interrupted(asked)\n",
        "",
        "examination",
    ),
    Removal(
        "the others stay until the first process has said why",
        "train/stopping.py",
        "    elif (store := _store()) is not None:",
        "    elif (store := None) is not None:",
        "until_the_first",
    ),
    Removal(
        "a process follows its launcher",
        "train/stopping.py",
        "        _die_with(_PARENT, signal.SIGTERM)",
        "        pass",
        "asks_a_launcher",
    ),
    Removal(
        "also one that ended before",
        "train/stopping.py",
        "        _die_with(_PARENT, signal.SIGTERM)",
        "        _die_with(os.getppid(), signal.SIGTERM)",
        "before_its_process_listens",
    ),
]

LOADING, CACHING = "train.models:load_base", "data.cache:_encode_batch"
STEP, SAVE = "train.loop:accumulate", "train.checkpoint:Checkpoints.save"
VALIDATION, ITS_BATCH = "train.validation:Validation.run", "train.validation:_moved"
PREVIEWS, PREVIEW = "train.previews:Previews._write", "train.previews:Previews._picture"
SETTLE = "train.pauses:Pause.settle"


def looking(world: Path) -> tuple[str, ...]:
    """A run that looks at its weights between steps: a validation after 0, 2, 4 and 6, previews
    after 0, 3 and 6. It saves after 2, 4 and 6."""
    return (
        "checkpoint.every=2",
        "checkpoint.keep=99",
        f"validation.path={world / 'pictures'}",
        "validation.every=2",
        "validation.images=4",
        "data.workers=2",
    )


@pytest.fixture(scope="module")
def plain(starter, world, tmp_path_factory):
    """What two processes end in that nobody interrupts."""
    output = tmp_path_factory.mktemp("case-09") / "run"
    starter.finish("train/lora.py", *arguments(world, output, *SPARSE), processes=2)
    return output


def test_a_run_that_is_asked_everywhere_ends_in_the_same_bits(starter, world, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    starter.finish("train/lora.py", *arguments(world, whole, *looking(world)))
    own = f"data.cache={tmp_path / 'cache'}"
    command = ["train/lora.py", *arguments(world, output, *looking(world), own)]
    saved: list[int] = []
    for name, at, step in (
        ("SIGHUP", CACHING, None),
        ("SIGTERM", STEP, 1),
        ("SIGUSR1", ITS_BATCH, 2),
        ("SIGINT", PREVIEW, 3),
        ("SIGTERM", SAVE, 4),
    ):
        run = starter.start(*command, faults=[by_itself(name, at)])
        ended_by(name, run, output, step=step)
        saved += [step] if step else []
        assert steps(output) == saved, f"{name} in {at}"
        shown = [path.name for path in output.glob("previews/*")]
        assert len(shown) == (step is not None) + (step == 4), shown
    # What comes after training is finished all the same.
    finished(starter, command, output, faults=[by_itself("SIGTERM", SETTLE)])
    same_end(output, whole)
    for picture in sorted(whole.glob("previews/**/*.png")):
        assert (output / picture.relative_to(whole)).read_bytes() == picture.read_bytes()


def test_one_process_of_two_is_asked_and_both_end(starter, world, plain, tmp_path):
    output = tmp_path / "run"
    own = f"data.cache={tmp_path / 'cache'}"
    command = ["train/lora.py", *arguments(world, output, *SPARSE, own)]
    for name, at, rank, step in (("SIGUSR1", CACHING, 1, None), ("SIGTERM", STEP, 0, 1)):
        run = starter.start(*command, processes=2, faults=[by_itself(name, at, rank=rank)])
        ended_by(name, run, output, step=step)
    assert steps(output) == [1]
    finished(starter, command, output, processes=2)
    same_end(output, plain)


def test_a_signal_to_the_whole_group_ends_no_loader(starter, world, tmp_path):
    output = tmp_path / "run"
    command = ["train/lora.py", *arguments(world, output, *SPARSE, "data.workers=2")]
    run = starter.start(*spoiled("group", 2), *command)
    ended_by("SIGTERM", run, output, step=2)
    assert steps(output) == [2]


@pytest.mark.slow
def test_a_signal_to_a_loader_that_just_begins_does_not_end_it(starter, world, tmp_path):
    output = tmp_path / "run"
    command = ["train/lora.py", *arguments(world, output, *SPARSE, "data.workers=2")]
    born = "torch.utils.data._utils.signal_handling:_set_worker_signal_handlers"
    finished(starter, command, output, faults=[by_itself("SIGTERM", born, after=True)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, at, rank, call, step",
    [
        ("SIGTERM", STEP, 1, 3, 3),
        ("SIGHUP", SAVE, 1, 1, 2),
        ("SIGUSR1", ITS_BATCH, 1, 1, 0),
        ("SIGINT", VALIDATION, 0, 2, 2),
        ("SIGTERM", PREVIEW, 0, 1, 0),
        ("SIGTERM", PREVIEWS, 1, 2, 3),
        ("SIGTERM", STEP, None, 2, 2),
        ("SIGUSR1", CACHING, None, 1, None),
        ("SIGTERM", LOADING, 1, 1, None),
        ("SIGTERM", SAVE, None, 3, 6),
    ],
)
def test_two_processes_end_alike_wherever_one_or_both_are_asked(
    starter, world, tmp_path, name, at, rank, call, step
):
    whole, output = tmp_path / "whole", tmp_path / "run"
    own = f"data.cache={tmp_path / 'cache'}"
    command = ["train/lora.py", *arguments(world, output, *looking(world), own)]
    run = starter.start(*command, processes=2, faults=[by_itself(name, at, call, rank=rank)])
    ended_by(name, run, output, step=step)
    assert newest(output) == (step or 0)
    finished(starter, command, output, processes=2)
    starter.finish("train/lora.py", *arguments(world, whole, *looking(world), own), processes=2)
    same_end(output, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_the_caching_of_another_stops_it(starter, world, tmp_path, rank):
    """The other one takes two seconds for each picture of its share."""
    own = (f"data.cache={tmp_path / 'cache'}", "data.cache_batch_size=1")
    output, other = tmp_path / "run", 1 - rank
    waits, cached = tmp_path / "waits", tmp_path / "cached"
    faults = [
        Fault(at="train.stopping:Agreement.wait", do=f"record:{waits}", rank=rank),
        Fault(at=CACHING, do=f"record:{cached}", rank=other),
    ]
    command = ["train/lora.py", *arguments(world, output, *SPARSE, *own)]
    run = starter.start(*spoiled("slow", rank=other), *command, processes=2, faults=faults)
    # It has waited once before, for the other to join.
    run.until(lambda: len(recorded(waits)) == 2 and recorded(cached))
    run.signal(signal.SIGTERM, rank)
    ended_by("SIGTERM", run, output, step=None)
    assert 1 <= len(recorded(cached)) <= 2  # of four or five pictures


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_examination_is_left_by_both_processes(starter, world, tmp_path, rank):
    tiny_clip(tmp_path / "clip", dimension=4)
    output = tmp_path / "run"
    scored = (
        "evaluation.every=2",
        f"evaluation.path={world / 'pictures'}",
        f"evaluation.clip={tmp_path / 'clip'}",
        "evaluation.quick_images=4",
        "evaluation.batch_size=1",
        "evaluation.steps=1",
        "validation.every=0",
    )
    # Each process makes two pictures, and is asked when it has made one more.
    asked = by_itself("SIGTERM", "eval.generation:_sample", 3, rank=rank)
    command = ["train/lora.py", *arguments(world, output, *SPARSE, *scored)]
    run = starter.start(*command, processes=2, faults=[asked])
    ended_by("SIGTERM", run, output, step=2)
    assert not list(output.glob("eval/steps/step-00000002.json"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher, processes, code", [("torchrun", 2, 1), ("accelerate", 1, -15)])
@pytest.mark.parametrize("asked", ["SIGTERM", "SIGKILL"])
def test_what_asks_a_launcher_asks_its_processes(
    starter, world, tmp_path, launcher, processes, code, asked
):
    """What it ends with itself says less than interrupted.json. One that is killed cannot tell
    them; the kernel does."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    long = (*SPARSE, "train.steps=40", "data.workers=2")
    command = ["train/lora.py", *arguments(world, output, *long)]
    run = starter.start(*command, processes=processes, launcher=launcher)
    run.until(lambda: lines(output) >= 2, timeout=120)
    run.signal(signal.Signals[asked])
    assert run.wait() == [code if asked == "SIGTERM" else -signal.SIGKILL]
    nothing_lives(run)
    (step,) = steps(output)
    assert 2 <= step < 40
    assert interruption(output) == {"signal": "SIGTERM", "exit_code": 143, "step": step}
    finished(starter, command, output, processes=processes)
    starter.finish("train/lora.py", *arguments(world, whole, *long), processes=processes)
    same_end(output, whole)


@pytest.mark.slow
def test_a_launcher_that_ends_before_its_process_listens_takes_it_along(starter, world, tmp_path):
    output = tmp_path / "run"
    command = ["train/lora.py", *arguments(world, output, *SPARSE)]
    run = starter.start(*command, launcher="accelerate")
    run.until(
        lambda: "steps    6 steps" in run.output, timeout=120
    )  # then it imports what is heavy
    run.signal(signal.SIGTERM)
    assert run.wait() == [-signal.SIGTERM]
    nothing_lives(run)
    assert interruption(output)["signal"] == "SIGTERM"
    assert steps(output) in ([], [1])


@pytest.mark.slow
def test_where_the_save_fails_no_process_waits_for_it(starter, world, tmp_path):
    command = ["train/lora.py", *arguments(world, tmp_path / "run", *SPARSE)]
    full = Fault(at="train.checkpoint_files:write_pieces", do="raise:OSError:28")
    run = starter.start(*command, processes=2, faults=[by_itself("SIGTERM", STEP, 2), full])
    assert run.wait(60) == [1, 1]
    nothing_lives(run)
    assert "error: the checkpoint of step 2 could not be written" in run.output
    assert "Traceback" not in run.output and not (tmp_path / "run/interrupted.json").exists()


@pytest.mark.slow
def test_the_others_stay_until_the_first_process_has_said_why(starter, world, tmp_path):
    """A launcher may kill it once one of them has ended."""
    told = tmp_path / "told"
    command = ["train/lora.py", *arguments(world, tmp_path / "run", *SPARSE)]
    faults = [
        by_itself("SIGTERM", STEP, 2),
        record(told, "train.stopping:_tell"),
        Fault(at="train.stopping:_tell", do="hang"),
    ]
    run = starter.start(*command, processes=2, faults=faults)
    run.until(lambda: recorded(told))
    time.sleep(2)
    assert run.codes == [None, None]
    run.signal(signal.SIGKILL, 0)  # nor do they stay for ever
    assert run.wait(70) == [-signal.SIGKILL, 143]


def lines(output: Path) -> int:
    """Steps that are in metrics.jsonl."""
    file = output / "metrics.jsonl"
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0
