"""Evaluation in the course of training: what chooses the best, what it leaves alone, what fails."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from eval.in_training import BETTER
from tests.kills import killed_and_resumed
from tests.runs import arguments
from tests.test_loop import Regression, Samples, logged
from tests.test_pauses import HeldOut
from train import report, report_charts
from train.checkpoint import Checkpoints
from train.config import EvaluationConfig, LoopConfig, LoraRun, RunFailed, UserError, load, validate
from train.examination import (
    Examination,
    Examined,
    NotExamined,
    changed,
    failures,
    read,
    together,
)
from train.loop import fit
from train.stopping import Interrupted
from train.tracking import Trackers

STEPS, AIM = 8, 1.1  # the weight goes from 0.5 to 2, by 0.1 a step


class Pipe:
    """A pipeline whose pictures are as bright as the weight is large."""

    def __init__(self, weight):
        self.weight, self.scheduler, self.seen = weight, "own", []

    def __call__(self, prompt, **settings):
        grey = int(100 * self.weight.item())
        return SimpleNamespace(images=[Image.new("L", (8, 8), grey)])


class Painter(Regression):
    def __init__(self):
        super().__init__()
        self._pipe = Pipe(self.model.weight)

    def pipeline(self):
        return self._pipe


class Brightness:
    """Scores one picture by its mean: `off` is how far it is from AIM, less being better."""

    better = {"fid": "less", "clip_score": "more"}
    counts = {"pictures": 1, "reference": 3}

    def __init__(self, fails=None):
        self.fails, self.weights, self.modes = fails or {}, [], []

    def __call__(self, pipeline, *, folder):
        assert not torch.is_grad_enabled() and not pipeline.weight.requires_grad
        assert not list(folder.iterdir())
        self._disturb(pipeline)
        picture = pipeline("a").images[0]
        picture.save(folder / "00000.png")
        self.weights.append(pipeline.weight.item())
        error = self.fails.get(len(self.weights))
        if error is not None:
            raise error
        off = abs(np.asarray(picture).mean() / 100 - AIM)
        return {"fid": off, "clip_score": -off, "broken": math.nan}

    def _disturb(self, pipeline):
        torch.manual_seed(len(self.weights))
        np.random.seed(0)
        random.seed(0)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = True
        pipeline.scheduler = "another"


LOSS = "validation/loss"


def run(output, judge=None, *, method=None, held_out=None, **sections):
    """Returns the method, as it ends."""
    method = method or Painter()
    usual = {
        "train": {"steps": STEPS, "batch_size": 3, "clip_norm": 1e9},
        "optim": {"learning_rate": 0.1, "schedule": "constant", "weight_decay": 0},
        "checkpoint": {"every": 3},
        "tracking": {"every": 100},
        "validation": {"metric": "fid", "use_best": True, "every": 2},
        "evaluation": {"every": 2},
    }
    values = {name: section | sections.get(name, {}) for name, section in usual.items()}
    config = validate(LoopConfig, values | {"output": str(output)}, where="test")
    samples = Samples(config.train.steps)
    samples.held_out = held_out
    fit(method, samples, config, Accelerator(cpu=True), judge)
    return method


def scores(output, name="fid"):
    return {one.step: one.value(name) for one in read(output / "eval/steps")}


# A whole run


def test_pictures_are_scored_before_the_first_step_every_so_often_and_at_the_end(tmp_path):
    judge = Brightness()
    run(tmp_path, judge, evaluation={"every": 3})
    assert list(scores(tmp_path)) == [0, 3, 6, 8]
    assert judge.weights[0] == 0.5 and len(set(judge.weights)) == 4
    lines = [line for line in logged(tmp_path) if "evaluation/fid" in line]
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    assert [line["evaluation/fid"] for line in lines] == list(scores(tmp_path).values())
    assert all(line["evaluation/broken"] is None for line in lines)
    content = json.loads((tmp_path / "eval/steps/step-00000003.json").read_text())
    assert (content["step"], content["pictures"], content["reference"]) == (3, 1, 3)
    assert content["metrics"].keys() == {"fid", "clip_score", "broken"}
    with Image.open(tmp_path / "eval/steps/step-00000003/00000.png") as picture:
        assert picture.getpixel((0, 0)) == int(100 * judge.weights[1])


@pytest.mark.parametrize("kind", [{}, {"ema_decay": 0.5}])
@pytest.mark.parametrize("metric", ["fid", "clip_score"])
def test_a_run_ends_with_the_weights_whose_pictures_are_best(tmp_path, metric, kind):
    judge = Brightness()
    method = run(tmp_path, judge, validation={"metric": metric}, train=kind)
    measured = scores(tmp_path)
    best = min((step for step in measured if step), key=measured.get)
    assert 0 < best < STEPS and (tmp_path / f"checkpoints/step-{best:08d}").is_dir()
    assert method.model.weight.item() == judge.weights[best // 2]
    marked = json.loads((tmp_path / "checkpoints/best.json").read_text())
    value = scores(tmp_path, metric)[best]
    assert marked == {"step": best, "metric": metric, "value": value}


def test_the_held_out_loss_is_measured_beside_it_and_does_not_choose(tmp_path):
    run(tmp_path, Brightness(), held_out=HeldOut())
    lines = {line["step"]: line[LOSS] for line in logged(tmp_path) if LOSS in line}
    best = json.loads((tmp_path / "checkpoints/best.json").read_text())["step"]
    lowest = min((step for step in lines if step), key=lines.get)
    assert lines.keys() == scores(tmp_path).keys() and lowest < best


# Nothing of the training changes


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path):
    plain = run(tmp_path / "plain", validation={"metric": "loss", "use_best": False})
    judged = run(tmp_path / "judged", Brightness(), validation={"use_best": False})
    assert torch.equal(judged.model.weight, plain.model.weight)
    assert judged.model.noise == plain.model.noise
    assert judged.model.training and judged.model.weight.requires_grad


def test_what_the_judge_changes_is_put_back_even_where_it_fails(tmp_path, monkeypatch):
    for flag in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, flag, False)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    before = state()
    for error in (None, RuntimeError("no")):
        method = Painter()
        method.model.train()
        examined(tmp_path, Brightness({1: error})).run(method, 2)
        assert state() == before
        assert method.pipeline().scheduler == "own"
        assert method.model.training and method.model.weight.requires_grad


def state():
    kernels = torch.backends.cudnn
    drawn = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    return (*drawn, kernels.enabled, kernels.benchmark, kernels.deterministic)


# Failing


def test_a_judge_that_fails_costs_the_step_its_scores_and_not_the_run(tmp_path, capsys):
    fails = {2: UserError("held-out/3.png cannot be read"), 3: torch.OutOfMemoryError("full")}
    judge = Brightness(fails)
    run(tmp_path, judge)
    assert list(scores(tmp_path)) == [0, 6, 8] and len(judge.weights) == 5
    said = capsys.readouterr().out
    assert "warning: step 2 has no scores: held-out/3.png cannot be read" in said
    assert "warning: step 4 has no scores: OutOfMemoryError: full" in said
    folders = sorted(path.name for path in (tmp_path / "eval/steps").iterdir() if path.is_dir())
    assert folders == ["step-00000000", "step-00000006", "step-00000008"]
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "The pictures of 2 steps could not be made and scored (2, 4)" in page
    assert "at last because of: OutOfMemoryError: full" in page


def test_where_every_one_fails_the_last_weights_stay(tmp_path, capsys):
    judge = Brightness(dict.fromkeys(range(2, 9), RuntimeError("no")))
    method = run(tmp_path / "all", judge)
    assert "no fid was finite: the last weights are taken" in capsys.readouterr().out
    assert method.model.weight.item() == judge.weights[-1]
    assert not (tmp_path / "all/checkpoints/best.json").exists()


def test_what_fails_before_the_first_step_ends_the_run_with_nothing_lost(tmp_path):
    with pytest.raises(UserError, match="no such extractor"):
        run(tmp_path, Brightness({1: UserError("no such extractor")}))
    with pytest.raises(
        RunFailed, match=r"base's.*TypeError: wrong.*evaluation\.batch_size.*every=0"
    ):
        run(tmp_path, Brightness({1: TypeError("wrong")}))
    assert not (tmp_path / "checkpoints").exists()
    run(tmp_path, Brightness())
    assert list(scores(tmp_path)) == [0, 2, 4, 6, 8]


def test_where_a_run_goes_on_a_mistake_ends_it_and_bad_luck_does_not(tmp_path):
    some = examined(tmp_path, Brightness({1: MemoryError("full")}), start=2)
    assert some.run(Painter(), 2) is None and some.due(2, 9)
    assert failures(tmp_path) == {2: "MemoryError: full"} and read(tmp_path) == []
    some = examined(tmp_path, Brightness({1: UserError("no"), 2: UserError("gone")}), start=2)
    with pytest.raises(UserError, match="no"):
        some.run(Painter(), 2)
    assert some.run(Painter(), 4) is None and failures(tmp_path)[4] == "gone"
    course(examined(tmp_path, Brightness(), start=2), {2: 1.0})
    assert failures(tmp_path) == {} and [one.step for one in read(tmp_path)] == [2]


@pytest.mark.parametrize("mine", [None, (None, "OutOfMemoryError: here")])
def test_what_fails_in_one_process_is_raised_in_all(monkeypatch, mine):
    others = [(0, None, None), (0, None, "OutOfMemoryError: there")]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda said: [*said, *others])

    def work():
        if mine:
            raise NotExamined("here")
        return 1

    with pytest.raises(NotExamined, match="^here$" if mine else "there"):
        together(work)
    others.append((0, "evaluation.dino=x is missing", None))
    with pytest.raises(UserError, match="evaluation.dino"):
        together(work)
    others.append((15, None, None))
    with pytest.raises(Interrupted, match="SIGTERM"):
        together(work)
    others.clear()
    assert mine or together(work) == 1


# Killed


POINTS = {
    "its file": (Examined, "write"),
    "the judge": (Brightness, "__call__"),
    "a line of metrics": (Trackers, "log"),
    "a checkpoint": (Checkpoints, "save"),
    "marking the best": (Checkpoints, "mark_best"),
}


def left(output):
    lines = {json.dumps(line) for line in logged(output) if "evaluation/fid" in line}
    return {
        "checkpoints": sorted(path.name for path in (output / "checkpoints").iterdir()),
        "best": json.loads((output / "checkpoints/best.json").read_text()),
        "scores": scores(output),
        "lines": lines,  # a kill just after one was logged repeats it
        "pictures": {
            str(path.relative_to(output)): path.read_bytes()
            for path in output.rglob("eval/steps/*/*.png")
        },
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "straight"
    return run(output, Brightness()).model.weight.item(), left(output)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, straight, point, after
):
    killed = killed_and_resumed(
        monkeypatch,
        *POINTS[point],
        lambda output: run(output, Brightness()).model.weight.item(),
        tmp_path,
        after=after,
    )
    ends = [(weight, left(output)) for output, weight in killed]
    assert len(ends) > 2 and all(end == straight for end in ends)


# Going on


def examined(output, judge, *, start=0, kept=(), score="fid", use_best=False, **settings):
    config = EvaluationConfig(**({"every": 2} | settings))
    where = {"start": start, "kept": kept, "use_best": use_best}
    return Examination(judge, config, output, Accelerator(cpu=True), score=score, **where)


def course(some, weights):
    """Examines and writes what the weights give: {step: weight}."""
    for step, weight in weights.items():
        method = Painter()
        method.model.weight.data.fill_(weight)
        found = some.run(method, step)
        some.write(found)
    return found


def test_a_resumed_run_knows_what_was_scored_up_to_there_and_forgets_the_rest(tmp_path):
    weights = {0: 1.1, 2: 1.3, 4: 1.0, 6: 1.5, 8: 1.1}
    course(examined(tmp_path, Brightness()), weights)
    some = examined(tmp_path, Brightness(), start=6, kept=(2, 4, 6))
    assert [one.step for one in read(tmp_path)] == [0, 2, 4, 6]
    assert not (tmp_path / "step-00000008").exists() and (tmp_path / "step-00000006").exists()
    assert (some.best.step, some.value) == (4, pytest.approx(0.1))
    assert not some.due(6, 9) and some.due(8, 9) and some.due(9, 9) and not some.due(7, 9)
    assert course(some, {8: 1.05}) is some.best
    assert examined(tmp_path, Brightness(), start=6, kept=(2, 6)).best.step == 2
    assert examined(tmp_path, Brightness()).best is None and read(tmp_path) == []


@pytest.mark.parametrize("setting", ["images", "batch_size", "per_prompt", "every"])
def test_what_does_not_change_the_scores_keeps_the_best(tmp_path, setting):
    course(examined(tmp_path, Brightness()), {0: 1.1, 2: 1.1})
    same = examined(tmp_path, Brightness(), start=2, kept=(2,), **{setting: 7})
    assert same.best.step == 2
    course(same, {4: 1.2})
    assert [one.step for one in read(tmp_path)] == [0, 2, 4]


def test_scores_of_other_settings_are_not_compared_and_that_is_said(tmp_path, capsys):
    course(examined(tmp_path, Brightness()), {0: 1.1, 2: 1.3, 4: 1.2, 6: 1.1})
    other = examined(tmp_path, Brightness(), start=6, kept=(2, 4), steps=3, clip="x")
    said = capsys.readouterr().out
    assert "evaluation.clip was openai/clip-vit-large-patch14 and is x, evaluation.steps" in said
    assert "evaluation.steps was 25 and is 3" in said and "step 4, the best so far (fid 0.1" in said
    assert other.best is None and other.due(6, 9)
    assert course(other, {8: 2.0}) is other.best


def test_a_best_that_the_run_is_to_end_with_is_not_dropped(tmp_path):
    course(examined(tmp_path, Brightness()), {2: 1.1, 4: 1.3})
    going_on = {"start": 4, "kept": (2, 4), "score": "clip_score", "steps": 3}
    with pytest.raises(
        UserError, match=r"steps was 25 and is 3.*step 2,.*\(clip_score .*use_best=false"
    ):
        examined(tmp_path, Brightness(), use_best=True, **going_on)
    assert [one.step for one in read(tmp_path)] == [2, 4]
    assert examined(tmp_path, Brightness(), **going_on).best is None
    none_kept = going_on | {"kept": ()}
    assert examined(tmp_path, Brightness(), use_best=True, **none_kept).best is None


def test_a_setting_that_an_older_version_did_not_have_changes_nothing():
    assert changed({"steps": 3, "old": 1}, {"steps": 3, "new": 2}) == []
    assert changed({"steps": 3}, {"steps": 4}) == ["evaluation.steps was 3 and is 4"]


def test_a_method_without_pictures_has_none_scored(tmp_path):
    judge = Brightness()
    run(tmp_path, judge, method=Regression())
    assert judge.weights == [] and scores(tmp_path) == {}


# Before the run


def test_a_score_that_nobody_gives_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metric=dino is not among.*every=2.*\(fid, clip_score\)"):
        examined(tmp_path, Brightness(), score="dino")
    with pytest.raises(UserError, match=r"validation\.metric=fid.*gives \(none\)"):
        examined(tmp_path, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["validation.metric=fid"], r"validation\.metric=fid.*give evaluation\.every="),
        (["validation.metric=kid", "evaluation.every=2"], r"metric=kid needs evaluation\.path="),
        (["validation.metric=dino", "evaluation.every=2"], r"metric=dino needs evaluation\.dino="),
        (["validation.metric=loss_q5"], r"validation\.metric"),
    ],
)
def test_what_a_score_needs_is_asked_for_by_its_keys(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        load(LoraRun, arguments(tmp_path, tmp_path / "run", *settings))
    every = ["validation.metric=fid", "evaluation.every=2", f"evaluation.path={tmp_path}"]
    load(LoraRun, arguments(tmp_path, tmp_path / "run", *every))


# The report


def test_the_report_shows_the_course_of_every_score_and_the_best_step(tmp_path):
    for step, fid in ((0, 30.0), (20, 20.0), (40, 25.0)):
        values = {"fid": fid, "clip_t": 0.3, "other_one": math.nan if step else 1.0}
        counts = {"pictures": 8, "reference": 256, "dimension": 768}
        Examined(step, values, {}, counts).write(tmp_path / "eval/steps")
    (tmp_path / "eval/steps/step-00000060.json").write_text('{"step": 60, "metr')
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.json").write_text('{"step": 20}')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"validation": {"metric": "fid"}}))
    usual = {"epoch": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": 0.1, "images_per_second": 9}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 40, **usual}) + "\n")
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "FID, Fréchet distance, less is better, over optimizer steps" in page
    assert "CLIP-T, likeness to the prompt" in page and "<h3>other one</h3>" in page
    assert "8 pictures against 256 real ones, of the same prompts" in page
    assert "FID is measured on 8 and 256 pictures in 768 dimensions" in page
    assert page.count("Best: step 20") == 3
    assert page.index("<h2>Curves") < page.index("<h2>Scores of generated pictures")


def test_every_score_of_a_run_says_in_the_report_which_way_is_better():
    assert report_charts.SCORES.keys() == BETTER.keys()
    for name, way in BETTER.items():
        assert report_charts.SCORES[name][1].endswith(f"{way} is better")
