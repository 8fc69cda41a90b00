import json
import os
import shutil
from collections import namedtuple

import pytest

from train import rundir
from train.config import LoraRun, UserError, load, validate


def config(output, schema=LoraRun, **changes):
    values = {"output": str(output), "data": {"path": "pictures"}, "train": {"steps": 7}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return validate(schema, values, where="the test")


def trained(folder, wanted):
    """A run directory with a checkpoint: only then is it bound to its configuration."""
    rundir.create(wanted, {"base": {"sha256": {"unet": "a"}}, "dataset": {"sha256": "b"}})
    (folder / "checkpoints/step-00000002").mkdir(parents=True)


def test_a_new_directory_is_not_finished_and_checking_writes_nothing(tmp_path):
    assert rundir.check(config(tmp_path / "a/b"), result="adapter") is False
    assert not list(tmp_path.iterdir())


def test_the_written_configuration_repeats_the_run(tmp_path):
    wanted = config(tmp_path / "run", optim__learning_rate=3e-5, lora__targets=["proj"])
    rundir.create(wanted, {"processes": 1})
    assert load(LoraRun, ["--config", str(tmp_path / "run/config.yaml")]) == wanted
    assert sorted(os.listdir(tmp_path / "run")) == ["config.yaml", "manifest.json"]
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["processes"] == 1
    assert manifest["packages"]["torch"] and manifest["python"]


@pytest.mark.parametrize(
    ("program", "entry"),
    [
        (str(rundir.ROOT / "docs/examples/add_source.py"), "docs/examples/add_source.py"),
        ("mine/entry.py", "mine/entry.py"),
        ("-c", None),
        ("lib/site-packages/ipykernel_launcher.py", None),
    ],
)
def test_the_manifest_names_the_entry(tmp_path, monkeypatch, program, entry):
    monkeypatch.setattr("sys.argv", [program, "train.steps=7"])
    monkeypatch.chdir(tmp_path)
    rundir.create(config(tmp_path / "run"), {})
    assert json.loads((tmp_path / "run/manifest.json").read_text())["entry"] == entry


def test_a_run_is_finished_once_its_result_and_last_checkpoint_are_there(tmp_path):
    wanted = config(tmp_path)
    rundir.create(wanted, {})
    (tmp_path / "adapter").mkdir()
    assert not rundir.check(wanted, result="adapter")
    last = tmp_path / "checkpoints/step-00000007"
    last.mkdir(parents=True)
    os.utime(tmp_path / "adapter")
    assert rundir.check(wanted, result="adapter")
    assert not rundir.check(wanted, result="full")
    # Given more steps, a run that had ended ends once more, also where it is killed before that.
    os.utime(last, ns=(0, last.stat().st_mtime_ns + 10**9))
    assert not rundir.check(wanted, result="adapter")


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        rundir.check(config(tmp_path / "run"), result="adapter")


def test_a_place_that_takes_no_files_is_refused():
    with pytest.raises(UserError, match="output=/proc/run cannot be written"):
        rundir.check(config("/proc/run"), result="adapter")


def test_too_little_space_is_told_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10 * 2**30, 8 * 2**30, 2 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    rundir.check_space(tmp_path / "not/yet", 2 * 2**30, what="checkpoints")
    with pytest.raises(UserError, match="checkpoints: 3.00 GiB needed, 2.00 GiB free"):
        rundir.check_space(tmp_path / "not/yet", 3 * 2**30, what="checkpoints")


def test_small_amounts_are_told_in_mebibytes(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**20, 0, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="captions: 1.5 MiB needed, 1.0 MiB free"):
        rundir.check_space(tmp_path, 3 * 2**19, what="captions")


def test_what_was_agreed_to_is_put_down_each_time_it_was(tmp_path):
    def changes():
        return json.loads((tmp_path / "manifest.json").read_text())["changes"]

    wanted = config(tmp_path, checkpoint__accept_changes=True)
    rundir.create(wanted, {}, changes=["seed: 0 -> 1"])
    assert changes() == []  # before the first checkpoint nothing binds it
    for step, lines in enumerate((["seed: 1 -> 2"], [], ["seed: 2 -> 3", "base.unet: a -> b"]), 1):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        rundir.create(wanted, {}, changes=lines)
    assert [(one["step"], one["changes"]) for one in changes()] == [
        (1, ["seed: 1 -> 2"]),
        (3, ["seed: 2 -> 3", "base.unet: a -> b"]),
    ]


def test_an_agreement_is_not_kept(tmp_path):
    rundir.create(config(tmp_path, checkpoint__accept_changes=True), {})
    again = load(LoraRun, ["--config", str(tmp_path / "config.yaml")])
    assert again == config(tmp_path)


def test_a_run_that_begins_is_no_longer_interrupted(tmp_path):
    (tmp_path / "interrupted.json").write_text("{}")
    rundir.create(config(tmp_path), {})
    assert not (tmp_path / "interrupted.json").exists()
