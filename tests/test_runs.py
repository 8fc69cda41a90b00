import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from scripts import run_comparison, run_comparison_page, run_listing, run_tables, runs
from tests import pages
from tests.evaluated import evaluated
from tests.test_run_report import line, log, validate
from train import run_lock
from train.config import ROOT, UserError
from train.run_state import is_running, state_of

EVIL = "<b>bold</b> & 'q'"


def made(folder, *, rank=4, steps=40, loss=0.25, prompts=("a cat", "a dog"), held_out=None, **more):
    """A run directory without its model, finished where it has `steps` lines."""
    folder.mkdir(parents=True)
    settings = {
        "output": str(folder),
        "model": {"path": "data/assets/toy-base"},
        "train": {"steps": 40, "batch_size": 8, "mixed_precision": "no"},
        "lora": {"rank": rank, "alpha": 4.0},
        "optim": {"learning_rate": 1e-4},
        "preview": {"prompts": list(prompts), "seed": 7},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | more))
    (folder / "manifest.json").write_text(json.dumps({"dataset": {"pictures": 80}}))
    lines = [line(step, loss=loss) for step in range(10, steps + 1, 10)]
    if held_out is not None:
        lines += [
            {"step": 20, "validation/loss": held_out + 0.1, "validation/loss_se": 0.02},
            {"step": 40, "validation/loss": held_out, "validation/loss_se": 0.01},
        ]
    log(folder, lines)
    for name in ("base", "step-00000040"):
        (folder / "previews" / name).mkdir(parents=True)
        for k in range(len(prompts)):
            Image.new("RGB", (16, 16), (rank, k, 0)).save(folder / f"previews/{name}/{k:02d}.png")
    if steps == 40:
        (folder / "adapter").mkdir()
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    made(root / "one", rank=4, held_out=0.3)
    made(root / "sweep" / "two", rank=16, steps=20, loss=0.2)
    made(root / EVIL, rank=32, loss=0.5, held_out=0.2)
    evaluated(root / "one", gain=0.0, seed=1)
    (root / "cache" / "shards").mkdir(parents=True)
    (root / "torn").mkdir()
    (root / "torn/config.yaml").write_text("train: [")
    return root


def told(capsys, *arguments):
    runs.main(list(map(str, arguments)))
    return capsys.readouterr().out


# The list


def test_every_run_is_a_line_and_the_rest_is_named(root, capsys):
    said = told(capsys, "list", root)
    rows = {row.split("  ")[0]: row for row in said.splitlines()}
    for part in ("finished", "lora", "toy-base", "320", "0.250", "0.300 ± 0.0100", "20.00"):
        assert part in rows["one"]
    assert "21.00 [19.00, 23.00]" in rows["one"]  # FID with its interval
    assert "stopped" in rows["sweep/two"] and "20 of 40" in rows["sweep/two"]
    assert "3 runs: 2 finished, 1 stopped" in said
    assert "passed over: cache (no run), torn (its config.yaml is missing, torn" in said


def test_the_list_is_sorted_and_filtered(root, capsys):
    def names(*arguments):
        found = json.loads(told(capsys, "list", root, "json=true", *arguments))
        return [run["name"] for run in found["runs"]]

    assert names("sort=held_out") == [EVIL, "one", "sweep/two"]
    assert names("sort=loss") == ["sweep/two", "one", EVIL]
    assert names("sort=steps", "reverse=true")[0] == "sweep/two"
    assert names("sort=fid")[0] == "one"
    assert names("filter=lora.rank=16") == ["sweep/two"]
    assert names("filter=[SWEEP, lora.alpha=4, train.mixed_precision=no]") == ["sweep/two"]
    assert names("filter=lora.rank=5") == [] == names("filter=lora.rank=5", "sort=fid")
    assert "none of the runs in" in told(capsys, "list", root, "filter=lora.rank=5")
    with pytest.raises(UserError, match="sort=luck: give one of name, .*held_out.*fid"):
        names("sort=luck")
    with pytest.raises(UserError, match="no run has a setting lora.rnak; the nearest is lora.rank"):
        names("filter=lora.rnak=16")


def test_a_folder_without_runs_is_said_to_have_none(tmp_path, capsys):
    page = tmp_path / "list.html"
    said = told(capsys, "list", tmp_path, "filter=lora.rank=16", f"output={page}")
    assert "none of the runs" in said and "No runs, of those" in page.read_text(encoding="utf-8")
    assert told(capsys, "list", tmp_path).startswith(f"no runs in {tmp_path}")


def test_no_link_is_followed(root, capsys):
    (root / "again").symlink_to(root)
    (root / "sweep/best").symlink_to("two")
    said = told(capsys, "list", root)
    assert "3 runs:" in said and "again (a link)" in said


def test_every_state_is_counted(tmp_path, capsys):
    """Fails where a state is named in one place and not in the other."""
    (made(tmp_path / "bad", steps=20) / "failed.json").write_text('{"error": "no space"}')
    made(tmp_path / "stopped", steps=20)
    made(tmp_path / "new", steps=0)
    said = told(capsys, "list", tmp_path)
    assert "3 runs: 1 failed, 1 stopped, 1 not begun" in said


def test_json_has_every_number(root, capsys):
    found = json.loads(told(capsys, "list", root, "format=json", "sort=name", "filter=one"))
    (one,) = found["runs"]
    assert (one["state"], one["done"], one["planned"], one["images"]) == ("finished", 40, 40, 320)
    assert (one["held_out"], one["held_out_error"], one["held_out_step"]) == (0.3, 0.01, 40)
    assert one["scores"]["fid"] == {
        "title": "FID", "better": "less", "value": 21.0, "low": 19.0, "high": 23.0
    }  # fmt: skip
    assert one["seconds"] == pytest.approx(16) and len(found["passed_over"]) == 2


def test_a_narrow_terminal_loses_what_matters_least(root):
    found, _ = run_listing.summaries(root)
    wide = run_tables.terminal(found, width=None).splitlines()
    narrow = run_tables.terminal(found, width=100).splitlines()
    assert "base" in wide[0] and "base" not in narrow[0]
    assert "state" in narrow[0] and "FID" in narrow[0] and max(map(len, narrow)) <= 100


def test_hundreds_of_runs_are_listed_at_once_and_without_torch(tmp_path):
    for k in range(300):
        folder = tmp_path / f"run-{k:04d}"
        folder.mkdir()
        settings = {"train": {"steps": 100, "batch_size": 8}, "lora": {"rank": k}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        log(folder, [line(step) for step in range(10, 101, 10)])
    command = [sys.executable, "-X", "importtime", "scripts/runs.py", "list", str(tmp_path)]
    begun = os.times()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "300 runs: 300 stopped" in done.stdout and "| torch\n" not in done.stderr
    ended = os.times()
    assert ended.children_user - begun.children_user < 5


@pytest.mark.parametrize("content", ["", "[]", "train: 3", "train: {steps: x}", "\x00", "{" * 9999])
def test_whatever_a_folder_holds_the_list_is_made(tmp_path, content, capsys):
    made(tmp_path / "good")
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "manifest.json"):
        (folder / name).write_text(content)
    (folder / "eval").mkdir()
    (folder / "eval/metrics.json").write_text('{"scores": {"fid": {"values": {"finetuned": []}}}}')
    assert "good" in told(capsys, "list", tmp_path)


ODD_LINES = [
    {"step": None, "loss": 0.1},
    {"step": "20", "validation/loss": 0.3},
    {"step": True, "loss": 0.1},
    {"step": float("nan"), "loss": 0.1},
    {"step": 10**400, "loss": 0.1},
    {"step": 40, "loss": "low", "epoch": True, "images_per_second": None},
]
ODD_SETTINGS = [
    {"train": {"steps": "40", "batch_size": "8", "clip_norm": "1"}},
    {"train": {"steps": 1e400, "clip_norm": True}, "preview": {"prompts": 3}},
]


@pytest.mark.parametrize("odd", [*ODD_LINES, *ODD_SETTINGS], ids=str)
def test_whatever_its_files_say_a_run_is_listed_compared_and_reported(tmp_path, odd, capsys):
    folders = [tmp_path / "good", tmp_path / "odd"]
    made(folders[0])
    made(folders[1], **(odd if "step" not in odd else {}))
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(odd) + "\n")
    found = json.loads(told(capsys, "list", tmp_path, "json=true"))
    assert {run["name"] for run in found["runs"]} == {"good", "odd"}
    assert {run["done"] for run in found["runs"]} == {40}
    told(capsys, "compare", *folders)
    assert told(capsys, "report", folders[1])


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_listed(root, capsys, monkeypatch):
    def torn(run, name):
        if name == "one":
            raise ValueError("torn")
        return summary(run, name)

    summary = run_listing.summary
    monkeypatch.setattr(run_listing, "summary", torn)
    said = told(capsys, "list", root)
    assert "2 runs:" in said and "one (cannot be read: torn)" in said


# States


def test_a_run_that_has_its_lock_is_running_and_keeps_it(tmp_path):
    folder = made(tmp_path / "run", steps=20)
    script = (
        "import sys, pathlib; from train import run_lock\n"
        f"with run_lock.locked(pathlib.Path({str(folder)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "held\n"
    assert is_running(folder)
    assert str(state_of(folder, done=20, planned=40)) == "running at step 20 of 40"
    with pytest.raises(UserError, match="in use by another run"), run_lock.locked(folder):
        pass
    process.kill()
    process.communicate()
    assert (folder / run_lock.NAME).exists() and not is_running(folder)
    assert state_of(folder, done=20, planned=40).name == "stopped"


def test_how_a_run_ended_is_told(tmp_path):
    folder = made(tmp_path / "run", steps=20)
    assert state_of(folder, done=0, planned=40).name == "not begun"
    (folder / "interrupted.json").write_text('{"signal": "SIGTERM", "step": 20}')
    state = state_of(folder, done=20, planned=40)
    assert str(state) == "interrupted at step 20 by SIGTERM"
    (folder / "adapter").mkdir()
    assert state_of(folder, done=40, planned=40).name == "finished"


# Comparing


def test_what_differs_is_told_and_nothing_else(root, capsys, tmp_path):
    page = tmp_path / "page.html"
    said = told(capsys, "compare", root / "one", root / EVIL, f"output={page}")
    rows = [row.split("  ")[0] for row in said.splitlines()]
    assert "lora.rank" in rows and "lora.alpha" not in rows and "output" not in rows
    assert "Best held-out loss" in said and "0.200 [± 0.0100, step 40]" in said
    assert "Nothing here tells which run is better" in said
    text = page.read_text(encoding="utf-8")
    assert "<b>bold" not in text and "&lt;b&gt;bold" in text and "lora.<wbr>rank" in text


def test_runs_that_were_evaluated_alike_are_tested_in_pairs(root, capsys):
    evaluated(root / "sweep/two", gain=0.03, seed=2)
    said = told(capsys, "compare", root / "one", root / "sweep/two")
    assert "two follows the prompts better than one (CLIP score +" in said
    page = root / "compare-one-two.html"
    assert str(page) in said and "<h2>Paired scores</h2>" in page.read_text(encoding="utf-8")


def test_held_out_losses_are_paired_by_picture(tmp_path):
    folders = [made(tmp_path / name) for name in ("a", "b")]
    for folder, gain in zip(folders, (0.0, -0.1), strict=True):
        validate(folder, 40, [0.5 + gain + k / 100 for k in range(8)])
    (said,) = run_comparison.held_out_differences(run_comparison.Compared.read(folders))
    assert said.startswith("The held-out loss of b is lower than that of a (−0.100, 95 %")


def test_pictures_of_the_same_prompt_and_seed_are_put_side_by_side(tmp_path):
    one = made(tmp_path / "one", prompts=("a cat", "a dog"))
    two = made(tmp_path / "two", prompts=("a cow", "a dog", "a cat"))
    (shared,) = run_comparison.shared_previews(run_comparison.Compared.read([one, two]))
    assert (shared.prompt, shared.seed) == ("a dog", 8)
    assert [(label, path.parents[2].name) for label, path in shared.pictures] == [
        ("one, step 40", "one"),
        ("two, step 40", "two"),
    ]
    assert shared.bases == [("base", one / "previews/base/01.png")]


def test_pictures_are_those_of_the_weights_that_a_run_ends_with(tmp_path):
    one, two = made(tmp_path / "one"), made(tmp_path / "two", validation={"use_best": True})
    (two / "checkpoints").mkdir()
    (two / "checkpoints/best.json").write_text('{"step": 1200}')
    shutil.copytree(two / "previews/step-00000040", two / "previews/step-00001200")
    shutil.copytree(two / "previews/step-00000040", two / "previews/step-00009000")
    first, _ = run_comparison.shared_previews(run_comparison.Compared.read([one, two]))
    assert [label for label, _ in first.pictures] == ["one, step 40", "two, step 1,200"]


@pytest.mark.parametrize(
    ("more", "base", "same"),
    [
        ({}, "another", True),
        ({"preview": {"prompts": ["a cat"], "seed": 7, "steps": 4}}, "its", True),
        ({"preview": {"prompts": ["a cat"], "seed": 7, "resolution": 96}}, "its", False),
    ],
)
def test_a_base_is_that_of_all_only_where_it_is(tmp_path, more, base, same):
    folders = [made(tmp_path / "one"), made(tmp_path / "two", **more)]
    for folder, weights in zip(folders, ("its", base), strict=True):
        (folder / "manifest.json").write_text(json.dumps({"base": {"sha256": {"unet": weights}}}))
    compared = run_comparison.Compared.read(folders)
    first = run_comparison.shared_previews(compared)[0]
    assert [label for label, _ in first.bases] == ["base of one", "base of two"]
    run_comparison_page.write(compared, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "base of two" in text and "two, step 40" in text
    assert ("the same noise" in text) == same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "a"], "give two to 8 runs, not 1"),
        (["compare", "a", "a"], "a is given more than once"),
        (["compare", "a", "cache/../a"], "is given more than once"),
        (["compare", "a", "cache"], "cache holds no config.yaml of a run"),
        (["compare", "a", "b", "output=x.png"], "ends in .html"),
        (["list", "nowhere"], "no such folder"),
        (["list", "sotr=loss"], "unknown key 'sotr'"),
        (["report", "cache"], "no run directory"),
        (["report", "missing"], "run=missing: no such folder"),
        (["report", "runs/rank=4"], "run=runs/rank=4: no such folder"),
        (["remove", "a"], "none of list, compare, report"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "a")
    (tmp_path / "cache").mkdir()
    with pytest.raises(UserError, match=message):
        runs.main(words)


# Pages


def test_the_report_of_a_killed_run_is_made_at_any_time(tmp_path, capsys):
    folder = made(tmp_path / "run", steps=20)
    said = told(capsys, "report", folder)
    assert said.splitlines() == ["stopped at step 20 of 40", str(folder / "report.html")]
    assert "Stopped: 20 of 40 steps" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_that_was_killed_before_its_result_is_not_finished(tmp_path, capsys):
    folder = made(tmp_path / "lr=1e-4")
    (folder / "adapter").rmdir()
    assert told(capsys, "report", folder).startswith("stopped at step 40 of 40")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Stopped: 40 of 40 steps" in text and "How to go on" in text
    assert "load_lora_weights" not in text
    (folder / "adapter").mkdir()
    told(capsys, "report", folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Finished: 40 of 40 steps" in text and "load_lora_weights" in text


def test_pages_are_well_formed_escaped_and_fetch_nothing(root, capsys, tmp_path):
    listed, compared = tmp_path / "list.html", tmp_path / "compare.html"
    told(capsys, "report", root / "one")
    told(capsys, "list", root, f"output={listed}")
    told(capsys, "compare", root / "one", root / EVIL, f"output={compared}")
    for page in (listed, compared):
        text = page.read_text(encoding="utf-8")
        assert pages.is_well_formed(page) and "://" not in text
        assert "<b>bold" not in text and "&lt;b&gt;bold" in text
    assert 'href="runs/one/report.html"' in listed.read_text(encoding="utf-8")


def test_pages_fit_every_screen_and_the_list_sorts(root, capsys, tmp_path):
    listed, compared = tmp_path / "list.html", tmp_path / "compare.html"
    os.utime(root / "one/metrics.jsonl", (1, 1))
    evaluated(root / "sweep/two", gain=0.03, seed=2)
    told(capsys, "list", root, f"output={listed}")
    told(capsys, "compare", root / "one", root / "sweep/two", f"output={compared}")
    window = pages.looked_at(tmp_path / "browser", compared, listed)
    first = "document.querySelector('tbody td').textContent"
    held_out = (
        "[...document.querySelectorAll('th button')].find(b => /held-out/.test(b.textContent))"
    )
    window.run(f"{held_out}.click()")
    assert window.run(first) == EVIL
    window.run(f"{held_out}.click()")
    assert window.run(first) == "one"
    last = "[...document.querySelectorAll('tbody tr')].at(-1).cells[0].textContent"
    assert window.run(last) == "sweep/two"  # which has none
    assert window.problems == []
    window.close()


def test_the_comparison_of_evaluations_fits_a_screen_with_long_names(tmp_path):
    from eval import compare

    names = ["a-long-name-of-a-run-with-lora-rank-16-and-lr-1e-4", "another-one-with-rank-32"]
    folders = [evaluated(tmp_path / name, gain=k / 50, seed=k) for k, name in enumerate(names)]
    compare.main([f"runs={json.dumps([str(f) for f in folders])}", f"output={tmp_path / 'out'}"])
    window = pages.looked_at(tmp_path / "browser", tmp_path / "out/compare.html")
    window.send(
        "Emulation.setDeviceMetricsOverride",
        width=1100, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    boxes = "[...document.querySelectorAll('.wide')].every(b => b.scrollWidth <= b.clientWidth)"
    assert window.run(boxes)
    window.close()
