import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from eval import evaluate as entry
from eval import generation, inputs
from eval.features import read_rgb
from tests.tiny import tiny_clip, tiny_pipeline
from train.config import UserError

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a red cat", "a dog", "a big house", "a <b>tree</b>", "a car"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a CLIP, held-out pictures of two shapes, and an adapter that changes the base."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "base")
    tiny_clip(folder / "clip", dimension=4)
    _pictures(folder / "held_out")
    _adapter(pipeline, folder / "adapter")
    return folder


@pytest.fixture
def run(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter").symlink_to(world / "adapter")
    config = {
        "output": str(folder),
        "model": {"path": str(world / "base")},
        "data": {"path": "unused", "resolution": 64, "bucket_step": 16},
        "lora": {"rank": 2},
        "evaluation": {
            "path": str(world / "held_out"),
            "clip": str(world / "clip"),
            "images": 6,
            "steps": 2,
            "guidance": 2.0,
            "batch_size": 3,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def _pictures(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k, prompt in enumerate(PROMPTS):
        shape = (64, 64, 3) if k % 2 else (48, 80, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(prompt)


def _adapter(pipeline, folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))


def _metrics(run: Path) -> dict:
    return json.loads((run / "eval" / "metrics.json").read_text())


def test_a_run_is_generated_scored_and_reported(run, capsys):
    entry.main([f"run={run}"])
    metrics = _metrics(run)
    fid = metrics["scores"]["fid"]
    assert fid["facts"]["pictures"] == 6 and fid["facts"]["references"] == 5
    assert fid["values"]["base"]["value"] != fid["values"]["finetuned"]["value"]
    assert {"kid", "cmmd", "clip_score", "vendi"} <= metrics["scores"].keys()
    assert [sample["seed"] for sample in metrics["samples"]] == list(range(1_000_000, 1_000_006))
    assert [sample["prompt"] for sample in metrics["samples"]] == [*PROMPTS, PROMPTS[0]]
    first = metrics["samples"][0]
    base, finetuned = (run / "eval" / first["pictures"][arm] for arm in ("base", "finetuned"))
    assert Image.open(base).size == tuple(first["size"]) == (80, 48)
    assert (read_rgb(base) != read_rgb(finetuned)).any()
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str(run / "eval" / "report.html"))
    assert metrics["verdict"] in printed
    report = (run / "eval" / "report.html").read_text()
    assert "a &lt;b&gt;tree&lt;/b&gt;" in report
    assert metrics["extractors"]["clip"]["sha256"] in report
    rows = (run / "eval" / "samples.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 and (run / "eval" / "scores.csv").is_file()


def test_an_adapter_that_does_nothing_changes_nothing(world, run):
    (run / "adapter").unlink()
    pipeline = tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(run / "adapter", unet_lora_layers=layers)
    entry.main([f"run={run}", "evaluation.images=4"])
    metrics = _metrics(run)
    for name in ("fid", "kid", "cmmd"):  # of too few prompts for a change to be told
        score = metrics["scores"][name]
        assert score["change"] is None and "prompts" in score["warning"]
        assert score["values"]["base"] == score["values"]["finetuned"]
    change = metrics["scores"]["clip_score"]["change"]
    assert change["value"] == change["low"] == change["high"] == 0
    assert metrics["keep"] == "unclear"


def test_again_and_in_two_processes_every_byte_is_the_same(world, run, tmp_path):
    extra = ["evaluation.general=[a house, a tree]", f"data.cache={tmp_path / 'one'}"]
    _done("eval/evaluate.py", f"run={run}", *extra)
    alone = _written(run)
    _done("eval/evaluate.py", f"run={run}", *extra)
    assert _written(run) == alone
    (run / "eval").rename(tmp_path / "kept")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    extra[-1] = f"data.cache={tmp_path / 'two'}"
    done = _done(*command, "eval/evaluate.py", f"run={run}", *extra)
    assert done.stdout.count("report.html") == 1
    two = _written(run)
    assert len([name for name in two if name.endswith(".png")]) == 12 + 6
    assert {name for name in alone if alone[name] != two.get(name)} == set()


def _written(run: Path) -> dict[str, bytes]:
    """All files of the evaluation but the report, whose bytes are those of metrics and pictures."""
    files = [p for p in (run / "eval").rglob("*") if p.is_file() and p.suffix != ".html"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def _done(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = _python(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def test_whole_fine_tuned_pipelines_are_evaluated_too(world, run):
    (run / "adapter").unlink()
    tiny_pipeline(seed=5).save_pretrained(run / "full")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["full"] = {"text_encoder": False}
    del config["lora"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    entry.main([f"run={run}", "evaluation.images=2"])
    assert _metrics(run)["settings"]["result"] == "full"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run=runs/NAME"),
        (["run={run}", "evaluation.imges=4"], "did you mean 'evaluation.images'"),
        (["run={run}", "evaluaton.images=4"], "evaluaton"),
        (["run={run}/gone"], "no config.yaml"),
        (["run={run}", "evaluation.path=null"], "evaluation.path is not set"),
        (["run={run}", "evaluation.path={run}/none"], "none"),
        (["run={run}", "evaluation.clip=./nowhere"], "./nowhere"),
        (["run={run}", "evaluation.seed=-1"], "evaluation.seed"),
        (["run={run}", "evaluation.general=[a, a]"], "'a' twice"),
        (["run={run}", "evaluation.protocol=objcts"], "did you mean objects"),
        (["run={run}", "evaluation.protocol=objects"], "evaluation.subject="),
        (["run={run}", "evaluation.protocol=style"], "evaluation.subject="),
        (["run={run}", "model.path=./nowhere"], "model.path=./nowhere"),
    ],
)
def test_a_mistake_is_named(run, arguments, message):
    with pytest.raises(UserError, match=message):
        entry.main([argument.format(run=run) for argument in arguments])
    assert not (run / "eval").exists()


def test_class_words_take_the_place_of_whole_words_only(run):
    config = inputs.read_run(run, ["evaluation.subject=red", "evaluation.noun=blue"])
    given = inputs.gather(config)
    texts = {t.prompt: t.class_prompt for t in inputs.plan(config, given).samples}
    assert texts["a red cat"] == "a blue cat" and texts["a dog"] is None
    config = inputs.read_run(run, ["evaluation.subject=ca", "evaluation.noun=x"])
    assert {t.class_prompt for t in inputs.plan(config, given).samples if "cat" in t.prompt}


def test_pictures_during_training_are_not_those_of_the_evaluation(run):
    config = inputs.read_run(run, [])
    given = inputs.gather(config)
    quick, whole = inputs.plan(config, given, images=4), inputs.plan(config, given)
    assert {t.seed for t in quick.samples}.isdisjoint(t.seed for t in whole.samples)
    assert len(quick.samples) == 4 and not (quick.prior or quick.general or quick.scales)


def test_a_picture_that_cannot_be_made_is_named_and_old_numbers_do_not_stay(run, monkeypatch):
    entry.main([f"run={run}", "evaluation.images=2"])
    monkeypatch.setattr(generation, "_sample", _not_finite)
    with pytest.raises(UserError, match="finetuned: the picture of .* came out not finite"):
        entry.main([f"run={run}", "evaluation.images=2", "evaluation.steps=3"])
    assert not (run / "eval" / "metrics.json").exists()


def _not_finite(pipeline, batch):
    if hasattr(pipeline.unet, "peft_config"):
        raise generation.NotFinite(batch[0]["prompt"], batch[0]["seed"])
    return np.zeros((len(batch), batch[0]["size"][1], batch[0]["size"][0], 3), np.uint8)


def test_an_output_that_cannot_be_written_is_named(run):
    (run / "eval").write_text("not a folder")
    with pytest.raises(UserError, match="eval cannot be used"):
        entry.main([f"run={run}"])


def test_a_run_without_a_result_is_refused(run):
    (run / "adapter").unlink()
    with pytest.raises(UserError, match="let the training finish"):
        entry.main([f"run={run}"])


def test_the_command_exits_with_2_and_one_line(run):
    done = _python("eval/evaluate.py", f"run={run}", "evaluation.path=/nowhere")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "/nowhere" in done.stderr


def test_help_answers_without_loading_anything_heavy():
    program = (
        "import sys; from eval.evaluate import main; main(['--help']); "
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    done = _python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "evaluation.images  (256)" in done.stdout


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
