import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval import compare, comparing
from eval.comparison_report import Comparisons, verdict
from eval.evaluated_runs import read_runs
from eval.generation import KEY
from eval.significance import holm, paired
from tests.evaluated import EXTRACTOR, SETTINGS, evaluated
from train.config import ROOT, UserError


@pytest.fixture
def runs(tmp_path):
    """a, and b that follows the prompts better by two points."""
    a = evaluated(tmp_path / "a")
    return a, evaluated(tmp_path / "b", gain=0.02, seed=1, grey=200)


def command(*arguments, runs):
    compare.main([f"runs=[{', '.join(map(str, runs))}]", *arguments])


def result(runs, **more):
    sides = read_runs(runs)
    comparing.check(sides)
    tests = comparing.compare(sides)
    return Comparisons(sides, tests, comparing.unpaired(sides, tests), **more)


def changed(run, **more):
    """The run with other content of metrics.json."""
    file = run / "eval/metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return run


def remade(side, place, **otherwise):
    """The picture of a sample as the evaluation writes it, with settings that may be others."""
    sample = list(side.samples().values())[place]
    of_all = {name: side.metrics["settings"][name] for name in ("steps", "guidance", "scheduler")}
    truth = {name: sample[name] for name in ("prompt", "seed", "size")}
    told = PngInfo()
    told.add_text(KEY, json.dumps(truth | of_all | {"weights": {"unet": "ab"}} | otherwise))
    path = side.file.parent / sample["pictures"]["finetuned"]
    Image.open(path).save(path, pnginfo=told)
    return sample, path


def test_command_says_what_differs_and_writes_it(runs, tmp_path, capsys):
    command(runs=runs)
    printed = capsys.readouterr().out
    assert "b follows the prompts better than a (CLIP score +" in printed
    assert "With 12 prompts you can see differences of about" in printed
    found = json.loads((tmp_path / "compare-a-b/compare.json").read_text())
    assert found["verdict"] in printed
    (test,) = found["tests"]
    assert test["change"]["low"] < 2 < test["change"]["high"] and test["p"] < 0.01
    page = (tmp_path / "compare-a-b/compare.html").read_text()
    assert html.escape(found["verdict"]) in page
    assert "Where b does best" in page
    assert page.count("data:image/png") == 12  # six pairs in its favour, and none in a's
    assert "http" not in re.sub(r"http-equiv", "", page)


def test_the_change_is_that_of_the_numbers_in_points(runs):
    (test,) = result(runs).tests
    rows = [json.loads((run / "eval/metrics.json").read_text())["samples"] for run in runs]
    points = np.array([[100 * s["scores"]["clip_score"]["finetuned"] for s in row] for row in rows])
    expected = paired(*points, np.arange(24) // 2)
    assert test.change.difference == pytest.approx(points[1].mean() - points[0].mean())
    assert test.change.groups == 12 and test.pictures == 24
    assert test.p == pytest.approx(expected.p)
    assert test.means == pytest.approx(tuple(points.mean(axis=1)))


def test_a_run_against_a_copy_of_it_differs_by_nothing(tmp_path):
    found = result([evaluated(tmp_path / "a"), evaluated(tmp_path / "b")])
    assert (found.tests[0].change.difference, found.tests[0].p) == (0.0, 1.0)
    assert verdict(found).startswith("No score differs clearly between a and b.")


def test_the_other_way_round_the_verdict_is_the_opposite(runs):
    assert "a follows the prompts less than b (CLIP score −" in verdict(result(runs[::-1]))


def test_pairs_are_found_in_any_order_of_the_samples(runs):
    before = result(runs).tests
    samples = json.loads((runs[1] / "eval/metrics.json").read_text())["samples"]
    changed(runs[1], samples=samples[::-1])
    assert result(runs).tests == before


def test_each_run_may_call_the_subject_as_it_likes(tmp_path):
    a = evaluated(tmp_path / "a", subject="zwx dog")
    b = evaluated(tmp_path / "b", subject="<my-dog>")
    assert result([a, b]).tests[0].pictures == 24


def test_the_subject_is_found_as_whole_words_alone(tmp_path):
    """Held-out captions: what an owl and a fox are called in other words stays."""
    a, b = (evaluated(tmp_path / name, subject=name) for name in ("owl", "fox"))
    for run in (a, b):
        samples = json.loads((run / "eval/metrics.json").read_text())["samples"]
        texts = [f"a bowl and a foxglove by the {run.name}'s nest {k}" for k in range(24)]
        changed(run, samples=[s | {"prompt": t} for s, t in zip(samples, texts, strict=True)])
    (test,) = result([a, b]).tests
    assert test.pictures == 24
    assert next(iter(read_runs([a])[0].samples()))[0].startswith("a bowl and a foxglove")


def test_a_thing_is_said_once_of_all_scores_that_say_it(tmp_path):
    a, b = evaluated(tmp_path / "a"), evaluated(tmp_path / "b", gain=0.02, seed=1)
    for run in (a, b):
        samples = json.loads((run / "eval/metrics.json").read_text())["samples"]
        for sample in samples:
            sample["scores"]["clip_t"] = sample["scores"]["clip_score"]
        changed(run, samples=samples)
    said = verdict(result([a, b]))
    assert said.count("follows the prompts better than a") == 1
    assert re.search(r"than a \(CLIP score \+[^;]*; CLIP-T \+[^;]*\)\.$", said)


def test_what_is_clear_alone_is_not_clear_among_many(tmp_path):
    """Only p raised for all tests of the command makes a difference clear."""
    runs = [evaluated(tmp_path / "a")]
    runs += [evaluated(tmp_path / f"r{k}", gain=0.0055, seed=k + 1) for k in range(6)]
    between = [t for t in result(runs).tests if t.change.p <= comparing.CLEAR < t.p]
    assert between  # or the test says nothing
    assert not any(test.clear or test.improved for test in between)
    assert not any(f"{test.second} follows" in verdict(result(runs)) for test in between)


def test_of_each_score_it_is_said_how_many_prompts_have_it(runs, tmp_path, capsys):
    scenes = [{"prompt": f"s{k}", "seed": k, "size": [8, 8], "distance": k / 9} for k in range(7)]
    for run in runs:
        changed(run, general=scenes)
    command(runs=runs)
    found = json.loads((tmp_path / "compare-a-b/compare.json").read_text())
    counts = {t["score"]: (t["prompts"], t["pictures"], t["clear"]) for t in found["tests"]}
    assert counts == {"clip_score": (12, 24, True), "forgetting": (7, 7, False)}
    page = (tmp_path / "compare-a-b/compare.html").read_text()
    for prompts, pictures in ((12, 24), (7, 7)):
        assert f"<td><b>{prompts}</b><small>{pictures} pictures</small></td>" in page
    assert re.search(r"12\s+\[24 pictures\]", capsys.readouterr().out)


OTHERWISE = {
    "prompt": "a cat",
    "seed": 5,
    "size": [16, 8],
    "weights": {"unet": "cd"},
    "guidance": 7,
    "steps": 3,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_picture_that_was_not_the_one_measured_is_refused(runs, name):
    changed(runs[1], settings=SETTINGS | {"weights": {"unet": "ab"}})
    (side,) = read_runs(runs[1:])
    sample, path = remade(side, 4)
    assert side.picture(sample) == path
    remade(side, 4, **{name: OTHERWISE[name]})
    with pytest.raises(UserError, match=f"{path} was made with another {name} .*evaluate b again"):
        side.picture(sample)


def test_no_other_picture_gets_into_the_page(runs):
    (side,) = read_runs(runs[1:])
    for place in range(24):
        remade(side, place, seed=-1)
    with pytest.raises(UserError, match="another seed"):
        command(runs=runs)


def test_a_damaged_picture_is_named(runs):
    for file in (runs[1] / "eval/finetuned").glob("*.png"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"b/eval/finetuned/.*\.png cannot be decoded"):
        command(runs=runs)


@pytest.mark.parametrize("kind", ["output", "rating"])
def test_a_place_that_cannot_be_written_is_named(runs, tmp_path, kind):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "page.html" if kind == "rating" else tmp_path / "file"
    with pytest.raises(UserError, match=f"{kind}={place} cannot be written"):
        command(f"{kind}={place}", runs=runs)


DAMAGES = {
    "samples.0.pictures": lambda m: m["samples"][0].pop("pictures"),
    "samples.0.pictures.finetuned": lambda m: m["samples"][0].update(pictures={"base": "x"}),
    "samples.0: not a JSON object": lambda m: m.update(samples=[1]),
    "samples.0.size": lambda m: m["samples"][0].update(size=[8]),
    "samples.0.scores.clip_score.finetuned": lambda m: m["samples"][0].update(
        scores={"clip_score": {"finetuned": None}}
    ),
    "scores": lambda m: m.update(scores=None),
    "scores.fid.values": lambda m: m["scores"]["fid"].update(values=None),
    "settings": lambda m: m.update(settings=None),
    "settings.subject": lambda m: m["settings"].update(subject=["x"]),
    "extractors": lambda m: m.update(extractors=None),
    "reference": lambda m: m.update(reference=[1]),
    "general.0": lambda m: m.update(general=[1]),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_evaluation_is_refused_by_name(runs, said):
    file = runs[1] / "eval/metrics.json"
    metrics = json.loads(file.read_text())
    DAMAGES[said](metrics)
    file.write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=rf"{file} cannot be read \({said}.*evaluate again"):
        command(runs=runs)


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "", '{"format": 2, "samples": [NaN]}'])
def test_what_is_no_json_object_is_refused_by_name(runs, text):
    file = runs[1] / "eval/metrics.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        command(runs=runs)


def test_all_tests_of_the_command_are_counted(runs, tmp_path):
    third = evaluated(tmp_path / "c", seed=2)
    found = result([*runs, third])
    assert [test.second for test in found.tests] == ["b", "c"]
    assert [t.p for t in found.tests] == pytest.approx(holm([t.change.p for t in found.tests]))
    assert verdict(found).count("b follows") == 1


def test_scores_of_whole_sets_stand_side_by_side(runs):
    found = result(runs)
    assert list(found.unpaired) == ["fid"]  # not the CLIP score, which was paired
    assert [value["value"] for value in found.unpaired["fid"]] == [21.0, 22.0]


def test_distance_from_the_base_is_compared_where_the_scenes_are_the_same(runs):
    def general(distance):
        return [
            {"prompt": f"scene {k}", "seed": k, "size": [8, 8], "distance": distance + k / 99}
            for k in range(8)
        ]

    changed(runs[0], general=general(0.1))
    changed(runs[1], general=general(0.3))
    found = result(runs)
    assert "changes unrelated pictures more than a" in verdict(found)
    changed(runs[1], general=general(0.3)[:6])
    assert [test.score for test in result(runs).tests] == ["clip_score"]


def test_what_became_of_the_class_is_compared_picture_by_picture(runs):
    def prior(alike):
        return [
            {
                "prompt": "a dog",
                "seed": k,
                "size": [8, 8],
                "scores": {"prior_preservation": {"base": 0.1, "finetuned": alike + k / 999}},
            }
            for k in range(16)
        ]

    changed(runs[0], prior=prior(0.1))
    changed(runs[1], prior=prior(0.4))
    found = result(runs)
    assert "turns the class into the subject more than a" in verdict(found)
    (test,) = (test for test in found.tests if test.score == "prior_preservation")
    assert test.pictures == test.change.groups == 16


UNLIKE = {
    "settings.guidance is 2 and 7": {"settings": SETTINGS | {"guidance": 7}},
    "settings.scheduler is": {"settings": SETTINGS | {"scheduler": {"_class_name": "Euler"}}},
    "extractor of clip, its sha256": {"extractors": {"clip": EXTRACTOR | {"sha256": "ff"}}},
    "extractor of clip, its resize": {"extractors": {"clip": EXTRACTOR | {"resize": "legacy_tf"}}},
    "held-out pictures, the sha256": {"reference": {"pictures": 64, "sha256": "ee"}},
    "evaluation.path, the held-out pictures, is given and missing": {"reference": None},
}


@pytest.mark.parametrize("said", UNLIKE)
def test_what_was_evaluated_otherwise_is_refused(runs, said):
    changed(runs[1], **UNLIKE[said])
    with pytest.raises(UserError, match=re.escape(said)) as error:
        command(runs=runs)
    assert "a and b cannot be compared" in str(error.value)


def test_other_prompts_and_seeds_are_refused(runs, tmp_path):
    samples = json.loads((runs[1] / "eval/metrics.json").read_text())["samples"]
    samples[3]["seed"] = 7
    changed(runs[1], samples=samples)
    with pytest.raises(UserError, match="'a dog number 1', seed 1000003, 8x8, is there and miss"):
        result(runs)
    with pytest.raises(UserError, match="seed 1000020, 8x8, is missing and there"):
        result([evaluated(tmp_path / "short", prompts=10), evaluated(tmp_path / "long")])


def test_what_is_no_evaluation_to_pair_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="no eval/metrics.json; run eval/evaluate.py"):
        command(runs=[runs[0], tmp_path / "nothing"])
    for content, said in (
        ({"format": 1}, "is of format 1, not 2"),
        ({"kind": "folders"}, "no prompts to pair"),
        ({"samples": []}, "no prompts to pair"),
    ):
        with pytest.raises(UserError, match=said):
            command(runs=[runs[0], changed(evaluated(tmp_path / "other"), **content)])
    (runs[1] / "eval/metrics.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        command(runs=runs)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["runs=a"], "two different runs"),
        (["runs=[a, a]"], "two different runs"),
        (["runs=[a, b]", "steps=[1, 2]"], "give one run"),
        (["runs=a", "steps=[1, 1]"], "two different steps"),
        (["runs=[a, b]", "votes=v.json"], "rating=FILE.html"),
        (["runs=[a, b]", "rating=page.htm"], "ends in .html"),
        (["runs=[a, b, c]", "rating=page.html"], "rating_kind=score"),
    ],
)
def test_what_does_not_go_together_is_told(arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        compare.main(arguments)


def test_different_training_pictures_are_noted_where_likeness_stands_on_them(runs):
    sides = read_runs(runs)
    assert comparing.notes(sides) == []
    for k, run in enumerate(runs):
        changed(run, reference=None, training={"pictures": 4, "sha256": str(k)})
    (note,) = comparing.notes(read_runs(runs))
    assert "trained on different pictures" in note


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [evaluated(tmp_path / "x/same"), evaluated(tmp_path / "y/same", seed=1)]
    assert [side.name for side in read_runs(paths)] == [str(path) for path in paths]


def test_steps_of_a_run_are_compared_by_their_numbers_and_pictures(tmp_path, capsys):
    run = evaluated(tmp_path / "run")
    steps = run / "eval/steps"
    for step, fid in ((0, 30.5), (100, 20.25)):
        folder = steps / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for k in range(3):
            (folder / f"{k:05d}.png").write_bytes(
                (run / f"eval/finetuned/{k + step // 50:05d}.png").read_bytes()
            )
        content = {"step": step, "metrics": {"fid": fid, "kid": None}, "settings": SETTINGS}
        (steps / f"step-{step:08d}.json").write_text(json.dumps(content))
    compare.main([f"runs={run}", "steps=[0, 100]"])
    printed = capsys.readouterr().out
    assert re.search(r"fid\s+30.50\s+20.25", printed) and "not paired" in printed
    page = (run / "eval/compare-step-0-step-100/compare.html").read_text()
    assert page.count("<figure>") == 6
    (steps / "step-foo.json").write_text("{}")
    with pytest.raises(UserError, match="not evaluated at step 50; there are 0, 100"):
        compare.main([f"runs={run}", "steps=[0, 50]"])


def test_pictures_that_are_gone_are_left_out(runs):
    (runs[0] / "eval/finetuned/00000.png").unlink()
    for file in (runs[1] / "eval/finetuned").glob("*.png"):
        file.unlink()
    command(runs=runs)
    assert "<figure>" not in (runs[0].parent / "compare-a-b/compare.html").read_text()


def test_help_answers_without_torch():
    code = (
        "import sys; from eval.compare import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "rating_kind" in done.stdout and done.stdout.endswith("False False\n")
