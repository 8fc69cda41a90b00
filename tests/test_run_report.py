import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import pages
from train import overfitting, report, run_figures, using
from train.run_record import Run

EVIL = "<script>alert('x')</script> & \""
CONFIG = {
    "train": {"steps": 40, "clip_norm": 1.0},
    "data": {"workers": 2},
    "preview": {"prompts": ["a cat", EVIL]},
}


class Page(HTMLParser):
    def __init__(self, run):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(report.write(run).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag, name):
        return [attributes.get(name) or "" for found, attributes in self.tags if found == tag]


def line(step, **values):
    usual = {"epoch": step / 10, "loss": 0.25, "lr": 1e-4, "grad_norm": 0.5}
    speed = {"images_per_second": 20.0, "data_wait_fraction": 0.01, "peak_memory_gib": 1.5}
    return {"step": step, **usual, **speed, **values}


def log(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "my-run"
    for name in ("base", "step-00000020", "step-00000040"):
        folder = run / "previews" / name
        folder.mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (16, 16), "red").save(folder / f"{k:02d}.png")
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    dataset = {"path": EVIL, "pictures": 80, "buckets": {"64x64": 1200}, "flip": True}
    manifest = {"python": "3.11.9", "packages": {"torch": "2.13.0"}, "dataset": dataset}
    (run / "manifest.json").write_text(json.dumps(manifest))
    log(run, [line(step) for step in (10, 20, 30, 40)])
    return run


def test_the_sentence_has_the_numbers(run):
    assert (
        "Finished: 40 of 40 steps on about 320 images (4 passes over 80 pictures); "
        "final loss 0.250 (smoothed), 20.00 images/s, 1.0 % of the time waiting for data."
    ) in Page(run).text


def test_everything_of_the_run_is_shown(run):
    page = Page(run)
    for text in ("64x64", "1,200", "yes", "torch: 2.13.0", "1.50 GiB", "clip_norm: 1.0"):
        assert text in page.text
    assert page.attributes("svg", "aria-label")[:4] == [
        "Loss, mean squared error, over optimizer steps",
        "Learning rate, learning rate, over optimizer steps",
        "Gradient norm, L2 norm before clipping, over optimizer steps",
        "Speed, images per second, over optimizer steps",
    ]
    prompts = ["a cat"] * 3 + [EVIL] * 3
    labels = ["base", "step 20", "step 40"] * 2
    expected = [f"{label}: {prompt}" for label, prompt in zip(labels, prompts, strict=True)]
    assert page.attributes("img", "alt") == expected


def test_all_text_is_escaped_and_nothing_is_fetched(run):
    (run / "eval").mkdir()
    (run / "eval" / "metrics.json").write_text(json.dumps({"verdict": EVIL}))
    page = Page(run)
    assert page.text.count(EVIL) == 4  # prompt, dataset, configuration, evaluation
    assert pages.is_well_formed(run / "report.html")
    assert not {"link", "iframe"} & {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert all(source.startswith("data:image/") for source in page.attributes("img", "src"))
    assert page.attributes("a", "href") == ["eval/report.html"]
    assert "://" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_healthy_run_has_no_warning_and_no_link_to_a_missing_evaluation(run):
    page = Page(run)
    assert "warning" not in page.attributes("p", "class") and not page.attributes("a", "href")


def test_trouble_comes_first(run):
    bad = {"data_wait_fraction": 0.5, "grad_norm": 3.0}
    log(run, [line(10), line(20, **bad), line(30, **bad), line(40, loss=None, left_out=7, **bad)])
    page = Page(run)
    classes = page.attributes("p", "class")
    assert classes[:4] == ["warning"] * 3 + ["verdict"]
    assert "gradient was not finite: 7, the first by step 40" in page.text
    assert "38 % of the time went into waiting for data" in page.text
    assert "above train.clip_norm=1 at 75 %" in page.text
    assert "final loss not finite" in page.text
    assert not re.search(r"[ MLH](nan|inf)", " ".join(page.attributes("path", "d")))


def test_the_best_step_that_a_run_ends_with_is_named(run):
    for step in range(1, 20):
        folder = run / "previews" / f"step-{step:08d}"
        folder.mkdir()
        Image.new("RGB", (16, 16)).save(folder / "00.png")
    (run / "checkpoints").mkdir()
    (run / "checkpoints/best.json").write_text(json.dumps({"step": 12}))
    assert "the best" not in Page(run).text
    chosen = CONFIG | {"validation": {"use_best": True}}
    (run / "config.yaml").write_text(yaml.safe_dump(chosen))
    page = Page(run)
    assert "(4 passes over 80 pictures); its weights are those of step 12, the best;" in page.text
    assert "step 12, the best: a cat" in page.attributes("img", "alt")
    log(run, [line(10)])
    assert "its weights" not in Page(run).text  # they are not chosen before the end


def test_an_unfinished_run_with_a_torn_last_line_shows_its_intact_lines(run):
    with (run / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(line(10)) + "\n" + json.dumps(line(20))[:37])
    assert "Not finished: 10 of 40 steps on about 80 images" in Page(run).text


@pytest.mark.parametrize("damage", ["{", ""])
def test_an_empty_or_damaged_run_still_has_a_report(tmp_path, damage):
    if damage:
        for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
            (tmp_path / name).write_text(damage)
    page = Page(tmp_path)
    assert "No step has been logged yet." in page.text
    assert not {"svg", "img", "input"} & {tag for tag, _ in page.tags}


def test_a_torn_or_missing_preview_is_left_out(run):
    torn = run / "previews" / "step-00000020" / "00.png"
    torn.write_bytes(torn.read_bytes()[:40])
    (run / "previews" / "base" / "00.png").unlink()
    cat = [alt for alt in Page(run).attributes("img", "alt") if alt.endswith("a cat")]
    assert cat == ["step 40: a cat"]


def test_speed_weighs_lines_by_their_time(run):
    # 10 steps at 10 images/s take three times as long as 10 at 30.
    slow = line(10, images_per_second=10.0, data_wait_fraction=0.4)
    log(run, [slow, line(20, images_per_second=30.0, data_wait_fraction=0.0)])
    speed, wait = report.pace(Run.read(run, {}))
    assert speed == pytest.approx(15) and wait == pytest.approx(0.3)


def test_smoothing_averages_the_last_five_and_keeps_gaps():
    smoothed = report.smooth([1.0, 3.0, math.nan, 5.0, 5.0, 5.0, 5.0])
    assert smoothed[:2] == [1.0, 2.0] and math.isnan(smoothed[2])
    assert smoothed[3:] == [3.0, 3.5, 4.5, 5.0]


def test_a_curve_is_drawn_where_its_values_are(run):
    log(run, [line(20, images_per_second=10.0), line(40, images_per_second=20.0)])
    speed = Page(run).attributes("path", "d")[-1]
    # Axes from x=50 (step 0) to 392 (step 40), from y=168 (0 images/s) to 26 (20 images/s).
    assert speed == "M221 97L392 26h0"


def test_a_long_run_stays_small_and_keeps_its_spike(run):
    quiet = [line(step) for step in range(1, 20_001)]
    log(run, [*quiet[:7_000], line(7_001, grad_norm=100.0), *quiet[7_001:]])
    page = Page(run)
    assert (run / "report.html").stat().st_size < 100_000
    assert any(re.search(r"L\S+ 26L", path) for path in page.attributes("path", "d"))


def test_facts_from_the_caller_join_those_of_the_manifest(run):
    text = report.write(run, dataset={"captions": 77}).read_text(encoding="utf-8")
    assert "<dt>Pictures</dt><dd>80</dd>" in text and "<dt>Captions</dt><dd>77</dd>" in text


# Pictures through time


def test_a_slider_has_a_place_for_every_step_and_begins_at_the_last(run):
    page = Page(run)
    (slider,) = [attributes for tag, attributes in page.tags if tag == "input"]
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == (
        "range",
        "0",
        "1",
        "1",
    )
    assert slider["aria-valuetext"] == "step 40" and page.attributes("label", "for") == ["time"]
    (names,) = [n for n in page.attributes("section", "data-names") if n]
    assert json.loads(names) == ["step 20", "step 40"]
    times = page.attributes("figure", "data-time")
    assert times == ["", "0", "1", "", "0", "1"]  # the base's stands always


def test_without_a_script_every_picture_is_there_and_the_slider_is_not(run):
    page = Page(run)
    assert ("div", {"class": "slide", "hidden": None}) in page.tags
    assert not any("hidden" in attributes for tag, attributes in page.tags if tag == "figure")


def test_the_policy_allows_the_page_its_own_script_alone(run):
    text = report.write(run).read_text(encoding="utf-8")
    (inline,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_many_previews_are_thinned_out(run):
    settings = CONFIG | {"preview": {"prompts": [f"prompt {k}" for k in range(30)]}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    for step in range(1, 100):
        folder = run / "previews" / f"step-{step:08d}"
        folder.mkdir(exist_ok=True)
        for k in (0, 29):
            Image.new("RGB", (8, 8)).save(folder / f"{k:02d}.png")
    page = Page(run)
    assert len(page.attributes("img", "alt")) <= 150
    assert "step 1: prompt 0" in page.attributes("img", "alt")
    assert "step 99: prompt 29" in page.attributes("img", "alt")


def test_the_slider_moves_by_keys_and_switches_all_prompts(run, tmp_path):
    window = pages.looked_at(tmp_path / "browser", report.write(run))
    shown = "[...document.querySelectorAll('figure')].map(f => f.hidden ? 0 : 1).join('')"
    assert window.run(shown) == "101101"
    assert not window.run("document.querySelector('.slide').hidden")
    window.run("document.querySelector('#time').focus()")
    window.press("ArrowLeft")
    assert window.run(shown) == "110110"
    assert window.run("document.querySelector('output').textContent") == "step 20"
    assert window.run("document.activeElement.getAttribute('aria-valuetext')") == "step 20"
    assert window.problems == []
    window.close()


# Verdict, times and use


def validate(run, step, losses):
    """As if the held-out pictures had these losses after so many steps."""
    side = overfitting.Side(
        [f"{k}.png" for k in range(len(losses))],
        np.full((len(losses), 4), 10),
        np.repeat(np.array(losses)[:, None], 4, axis=1),
    )
    overfitting.Measured(step, side, side).write(run / "validation")


def test_the_verdict_says_whether_the_held_out_loss_fell(run):
    validate(run, 0, [0.2, 0.4, 0.3])
    assert "held-out" not in report.learned(Run.read(run, {}))
    validate(run, 40, [0.1, 0.31, 0.2])
    found = report.learned(Run.read(run, {}))
    assert found == "On 3 held-out pictures the loss at step 40, 0.203, is 32.2 % below the base's."
    assert found in Page(run).text
    validate(run, 40, [0.1, 0.5, 0.3])
    assert "no sure difference" in report.learned(Run.read(run, {}))


def test_time_is_of_what_was_logged(run):
    # 320 images at 20 a second, of which 1 % waiting; and what was put down beside.
    (run / "timings.json").write_text('{"previews": 60.0, "checkpoints": 0.4}')
    log(run, [line(10), line(20), line(30), line(40)])
    parts = {part.name: part.seconds for part in run_figures.time_spent(Run.read(run, {}))}
    assert parts == {"Training steps": pytest.approx(15.84), "Previews": 60.0}
    assert "by the log and what it has recorded" in Page(run).text


def test_time_that_was_not_logged_is_what_lies_between_the_files(run):
    os.utime(run / "manifest.json", (1000, 1000))
    os.utime(run / "metrics.jsonl", (1116, 1116))
    *_, rest = run_figures.time_spent(Run.read(run, {}))
    assert rest.seconds == pytest.approx(100)
    os.utime(run / "previews/base", (900, 900))  # resumed: the manifest was written anew
    assert len(run_figures.time_spent(Run.read(run, {}))) == 1


METHODS = {
    "lora": ({"lora": {"rank": 4}}, ["load_lora_weights", "format=kohya", "<lora:my-run:1>"]),
    "full": ({"full": {}}, ["from_pretrained", "my-run/full", "format=single_file"]),
    "dreambooth": (
        {"dreambooth": {}, "lora": None},
        ["my-run/full", "format=single_file", "models/checkpoints"],
    ),
    "textual_inversion": (
        {"textual_inversion": {"tokens": [{"token": "<owl>"}]}, "lora": None},
        ["load_textual_inversion", "learned_embeds.safetensors", "embedding:"],
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_run_says_how_its_result_is_used(run, name):
    more, expected = METHODS[name]
    base = {"model": {"path": "some/base model"}}
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | base | more))
    assert using.method(Run.read(run, {})) == name
    text = Page(run).text
    for piece in [*expected, "scripts/generate.py", "eval/evaluate.py run=", "some/base model"]:
        assert piece in text or (piece == "some/base model" and "/full" in text)
    log(run, [line(10)])
    text = Page(run).text
    assert f"accelerate launch train/{name}.py --config" in text and "export.py" not in text


def of_method(run, **more):
    """The run as if its configuration had this too."""
    (run / "config.yaml").write_text(
        yaml.safe_dump(CONFIG | {"model": {"path": "some/base"}} | more)
    )
    return Run.read(run, {})


def saved_scheduler(run, name="DDIMScheduler"):
    (run / "adapter/scheduler").mkdir(parents=True)
    content = json.dumps({"_class_name": name})
    (run / "adapter/scheduler/scheduler_config.json").write_text(content)


PIVOTAL = {"textual_inversion": {"tokens": [{"token": "<owl>"}]}, "lora": {"rank": 4}}


@pytest.mark.parametrize(("token", "file"), [("<owl>", "owl"), ("<My-Run>", "My-Run-word")])
def test_the_word_and_the_lora_of_one_run_are_exported_to_two_files(run, token, file):
    found = of_method(run, **PIVOTAL | {"textual_inversion": {"tokens": [{"token": token}]}})
    (way,) = [way for way in using.ways(found) if "export.py" in way.lines]
    outputs = re.findall(r"output=(\S+)", way.lines)
    assert outputs == [f"{file}.safetensors", "my-run.safetensors"]


def test_a_result_is_drawn_with_the_scheduler_that_it_was_trained_with(run):
    """Fails where a zero terminal SNR is sampled as the base is, into washed-out pictures."""
    model = {"path": "some/base", "revision": "fp16"}
    lines = _with_diffusers(of_method(run, **PIVOTAL, model=model))
    assert lines[0] == "from diffusers import DDIMScheduler, DiffusionPipeline"
    assert lines[1].endswith('from_pretrained("some/base", revision="fp16")')
    assert lines[2].startswith("pipeline.scheduler = DDIMScheduler.from_pretrained(")
    assert lines[-1] == 'pipeline("a cat").images[0].save("picture.png")' and len(lines) == 6
    saved_scheduler(run, "EulerDiscreteScheduler")
    (run / "manifest.json").write_text('{"gpus": ["H200"], "base": {"family": "SD 2 depth"}}')
    lines = _with_diffusers(of_method(run, lora={"rank": 4}))
    assert lines[0] == "from diffusers import DiffusionPipeline, EulerDiscreteScheduler"
    assert lines[1].endswith('.to("cuda")') and "load_lora_weights" in lines[-1]  # no picture given
    (run / "adapter/scheduler/scheduler_config.json").unlink()
    assert "Scheduler" not in "".join(_with_diffusers(of_method(run, lora={"rank": 4})))


def _with_diffusers(found):
    (way,) = [way for way in using.ways(found) if way.title == "With diffusers"]
    compile(way.lines, "snippet", "exec")
    return way.lines.splitlines()


def test_a_run_goes_on_with_the_entry_that_began_it(run):
    assert using.continued(Run.read(run, {})) is None
    assert "launch train/lora.py --config" in using.continued(of_method(run, lora={})).lines
    (run / "manifest.json").write_text('{"entry": "docs/examples/add_source.py"}')
    command = f"accelerate launch docs/examples/add_source.py --config {run / 'config.yaml'}"
    assert using.continued(of_method(run, lora={})).lines == command
    assert using.continued(of_method(run)).lines == command  # of a method that is not the project's


def test_a_killed_run_is_told_to_be_one(run):
    log(run, [line(10)])
    text = report.write(run, state="Stopped").read_text(encoding="utf-8")
    assert "Stopped: 10 of 40 steps" in text
