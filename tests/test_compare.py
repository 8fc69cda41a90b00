import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from eval import compare, comparing
from eval.comparison_report import Comparisons, verdict
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
    sides = comparing.read_runs(runs)
    comparing.check(sides)
    tests = comparing.compare(sides)
    return Comparisons(sides, tests, comparing.unpaired(sides, tests), **more)


def changed(run, **more):
    """The run with other content of metrics.json."""
    file = run / "eval/metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return run


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


UNLIKE = {
    "settings.guidance is 2 and 7": {"settings": SETTINGS | {"guidance": 7}},
    "settings.scheduler is": {"settings": SETTINGS | {"scheduler": {"_class_name": "Euler"}}},
    "extractor of clip, its sha256": {"extractors": {"clip": EXTRACTOR | {"sha256": "ff"}}},
    "extractor of clip, its resize": {"extractors": {"clip": EXTRACTOR | {"resize": "legacy_tf"}}},
    "held-out pictures, the sha256": {"reference": {"pictures": 64, "sha256": "ee"}},
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
    sides = comparing.read_runs(runs)
    assert comparing.notes(sides) == []
    for k, run in enumerate(runs):
        changed(run, reference=None, training={"pictures": 4, "sha256": str(k)})
    (note,) = comparing.notes(comparing.read_runs(runs))
    assert "trained on different pictures" in note


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [evaluated(tmp_path / "x/same"), evaluated(tmp_path / "y/same", seed=1)]
    assert [side.name for side in comparing.read_runs(paths)] == [str(path) for path in paths]


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
