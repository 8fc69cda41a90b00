"""What a run of the tiny model leaves on wandb and TensorBoard, read back by their own means."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.runs import ROOT, arguments, finish, launch, make_world
from tests.wandb_log import OfflineRun
from train import norms, tracking
from train.board_tensorboard import TensorBoard
from train.boards import Hello
from train.config import TrackingConfig, UserError, read_yaml
from train.curves import CURVES, QUARTERS, drawn
from train.dashboard_process import Server
from train.embeddings import Embeddings
from train.packages import require_trackers
from train.tracking import read_metrics

ALL = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}
BOARDS = ["wandb", "tensorboard"]
SCORES = {
    "scores": {
        "kid": {
            "better": "less",
            "values": {
                "base": {"value": 0.3},
                "finetuned": {"value": 0.2, "low": 0.1, "high": 0.3},
            },
            "change": {"value": -0.1, "low": -0.2, "high": -0.05, "p": 0.01},
        }
    }
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that both have watched, with an evaluation added afterwards."""
    folder = tmp_path_factory.mktemp("tracked")
    world, output = make_world(folder), folder / "run"
    for name in ("report.json", "report.html", "pictures.jsonl"):  # as scripts/prepare.py leaves
        (world / name).write_text("{}")
    given = (
        f"tracking.trackers=[{', '.join(BOARDS)}]",
        "tracking.mode=offline",
        "tracking.project=pictures",
        "tracking.tags=[rank-2, seed-0]",
        "tracking.group=ranks",
        f"validation.path={world / 'pictures'}",
        "validation.every=3",
        "validation.images=4",
    )
    said = finish(launch("train/lora.py", *arguments(world, output, *given)))
    assert "warning" not in said, said
    settings = read_yaml(output / "config.yaml")
    config = TrackingConfig(**settings["tracking"])
    tracking.add_scores(output, settings, config, SCORES)
    return output


@pytest.fixture(scope="module")
def wandb_runs(run):
    """Of the training and of what was added."""
    return [OfflineRun(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]


@pytest.fixture(scope="module")
def watched(wandb_runs):
    return wandb_runs[0]


@pytest.fixture(scope="module")
def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance=ALL)
    return found.Reload()


# wandb


def test_wandb_has_configuration_tags_group_and_job(run, watched):
    about = watched.run
    assert (about.project, about.display_name) == ("pictures", "run")
    assert (list(about.tags), about.run_group, about.job_type) == (
        ["rank-2", "seed-0"],
        "ranks",
        "lora",
    )
    assert watched.config["lora"]["rank"] == 2
    assert watched.config["units"]["memory/peak_gib"] == "GiB"
    assert about.run_id == (run / "wandb_id.txt").read_text()


def test_wandb_has_every_curve_over_our_steps(run, watched):
    lines = read_metrics(run / "metrics.jsonl")
    assert {metric.glob_name: metric.step_metric for metric in watched.of("metric")}["*"] == "step"
    for line in lines:
        for curve, value in drawn(line):
            assert (line["step"], value) in watched.curve(curve.title)
    assert [step for step, _ in watched.curve("train/loss")] == [1, 2, 3, 4, 5, 6]
    for quarter in QUARTERS:
        assert [step for step, _ in watched.curve(quarter)] == [0, 3, 6]
    low, high = (watched.curve(f"validation/loss_{end}")[-1][1] for end in ("low", "high"))
    assert low < watched.curve("validation/loss")[-1][1] < high


def test_wandb_has_the_pictures_beside_the_bases_as_a_table_over_steps(watched):
    first, second = watched.tables("previews/table")
    rows = [row for table in (first, second) for row in table["data"]]
    assert first["columns"] == ["step", "prompt", "seed", "base", "fine-tuned"]
    assert sorted({(row[0], row[1], row[2]) for row in rows}) == [
        (3, "a large red circle", 0),
        (3, "a small blue star", 1),
        (6, "a large red circle", 0),
        (6, "a small blue star", 1),
    ]
    assert all(picture["_type"] == "image-file" for row in rows for picture in row[3:])
    name = "previews/00 a large red circle"
    assert [count for _, count in watched.curve(f"{name}.count")] == [2, 2]
    assert watched.curve(f"{name}.captions")[-1] == (6, ["base", "step 6"])


def test_wandb_has_the_norms_of_every_block(watched):
    blocks = {"down_blocks.0", "mid_block", "up_blocks.1"}
    for block in blocks:
        steps = [step for step, _ in watched.curve(f"norms/{block}")]
        assert steps == [2, 3, 4, 6]
        assert watched.curve(f"norms/{block}, by layer._type")[0] == (2, "histogram")
    values = [value for _, value in watched.curve("norms/mid_block")]
    assert values == sorted(values) and values[0] > 0


def test_wandb_has_system_metrics_and_what_the_run_made(watched):
    assert watched.of("stats")
    artifacts = watched.artifacts
    assert sorted(artifacts["dataset"]) == ["manifest.json", "report.html", "report.json"]
    assert "pytorch_lora_weights.safetensors" in artifacts["model"]
    assert artifacts["report"] == ["report.html"]


def test_an_evaluation_is_added_to_the_same_run(run, wandb_runs):
    first, second = wandb_runs
    assert first.run.run_id == second.run.run_id
    (table,) = second.tables("evaluation/scores")
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["metric"], row["base"], row["low"], row["value"], row["high"]) == (
        *("kid", 0.3),
        *(0.1, 0.2, 0.3),
    )
    assert row["verdict"] == "better"
    assert second.summary["evaluation/result/kid_low"] == 0.1


# TensorBoard


def test_tensorboard_has_every_curve(run, events):
    for line in read_metrics(run / "metrics.jsonl"):
        for curve, value in drawn(line):
            points = {event.step: event.value for event in events.Scalars(curve.title)}
            assert points[line["step"]] == pytest.approx(value, rel=1e-6)
    assert events.Scalars("system/resident_gib")[-1].value > 0
    assert events.Scalars("evaluation/result/kid_high")[0].step == 6
    assert events.SummaryMetadata("memory/peak_gib").summary_description == "GiB"


def test_tensorboard_has_pictures_norms_texts_and_a_layout(run, events):
    name = "previews/01 a small blue star"
    assert [event.step for event in events.Images(name)] == [3, 6]
    assert (events.Images(name)[0].width, events.Images(name)[0].height) == (128, 64)
    histograms = events.Histograms("norms/mid_block, by layer")
    assert [event.step for event in histograms] == [2, 3, 4, 6]
    assert histograms[0].histogram_value.num > 1
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert {"config", "units", "run", "model/adapter", "evaluation/scores"} <= texts
    assert "custom_scalars__config__" in texts


def test_a_resumed_run_hides_what_it_does_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 1.0), (2, 2.0)):
        hello = Hello(tmp_path, {}, "p", "run", start=start)
        board = TensorBoard(hello, lambda kind, text: None)
        for step in range(start + 1, start + 4):
            board.log({"step": step, "loss": loss})
        board.finish(0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        *((1, 1.0), (2, 1.0)),
        *((3, 2.0), (4, 2.0), (5, 2.0)),
    ]


# Trackio, where it is installed


def test_trackio_has_curves_pictures_norms_and_files(tmp_path):
    pytest.importorskip("trackio")
    (tmp_path / "adapter").mkdir()
    for name in ("adapter/weights", "manifest.json"):
        (tmp_path / name).write_text("{}")
    for name in ("base.png", "tuned.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    script = f"""
from pathlib import Path
from train import tracking
from train.config import TrackingConfig
output = Path({str(tmp_path)!r})
for start in (0, 1):
    config = TrackingConfig(trackers=["trackio"], project="p", mode="offline")
    trackers = tracking.open_trackers(output, {{"seed": 0}}, config, start=start, main=True)
    trackers.log({{"step": start + 1, "loss": 0.5}})
    (board,) = trackers._dashboards
    pair = {{"picture": str(output / "tuned.png"), "base": str(output / "base.png")}}
    board.show("previews", step=start + 1, pictures=[{{"prompt": "a cat", "seed": 1, **pair}}])
    board.show("norms", step=start + 1, blocks={{"mid_block": [1.0]}})
    trackers.deliver(output, {{}})
    trackers.finish()
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    asked = [sys.executable, "-m", "trackio.cli", "get", "run", "--project", "p", "--json"]
    name = f"{tmp_path.name}-{(tmp_path / 'trackio_id.txt').read_text()}"
    said = subprocess.run(
        [*asked, "--run", name], env=environment, capture_output=True, text=True, check=True
    ).stdout
    metrics = json.loads(said)["metrics"]
    assert {"train/loss", "norms/mid_block", "previews/table"} <= set(metrics)


# What is shown


def test_every_number_of_a_line_has_a_name_and_a_unit(run):
    names = {name for line in read_metrics(run / "metrics.jsonl") for name in line} - {"step"}
    assert names <= CURVES.keys()
    line = {"step": 1, "loss": None, "grad_norm": math.nan, "lr_text_encoder": 0.5}
    assert dict(drawn(line)) == {("train/learning_rate_text_encoder", CURVES["lr"].unit): 0.5}


def test_the_norm_of_a_layer_is_that_of_the_dense_product():
    up, down = torch.randn(12, 3), torch.randn(3, 8, 3, 3)
    dense = 0.5 * (up @ down.flatten(1))
    assert norms.product_norm(up[..., None, None], down, -0.5) == pytest.approx(dense.norm())


def test_whole_weights_and_new_words_have_norms_too():
    model = torch.nn.ModuleDict({"unet": torch.nn.ModuleDict({"mid_block": torch.nn.Linear(3, 2)})})
    layer = model["unet"]["mid_block"]
    assert norms.of(model) == {
        "mid_block": [pytest.approx(p.norm().item()) for p in (layer.weight, layer.bias)]
    }
    table = torch.nn.Embedding(5, 4)
    words = norms.of(Embeddings(table, [5], torch.ones(1, 4) * 0.1))
    assert words["embeddings/new_1"] == [pytest.approx(0.2)]
    assert words[norms.TABLE] == [pytest.approx(table.weight.norm(dim=1).median().item())]


def test_a_tracker_that_is_not_installed_is_said_beforehand(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sd-atelier\[trackio\]'"):
        require_trackers(["trackio"])
    require_trackers(tracking.shown_on(TrackingConfig(trackers=["wandb"], mode="disabled")))


def test_what_cannot_be_shown_costs_itself_alone(tmp_path):
    said: list[tuple[str, str]] = []
    server = Server("tensorboard", {}, lambda *message: said.append(message))
    board = TensorBoard(Hello(tmp_path, {}, "p", "run", start=0), lambda kind, text: None)
    for step in (1, 2):
        gone = {"prompt": "a", "seed": 0, "picture": str(tmp_path / "gone.png"), "base": None}
        server._pass_on(board, {"shows": "previews", "step": step, "pictures": [gone]})
        server._pass_on(board, {"step": step, "loss": 0.5})
    board.finish(0)
    ((kind, text),) = said
    assert kind == "warning" and "tensorboard goes on without previews (" in text


def test_the_documentation_has_every_name_and_unit():
    text = (ROOT / "docs/tracking.md").read_text()
    for name, (title, unit) in CURVES.items():
        assert f"| `{name}` | `{title}` | {unit} |" in text
